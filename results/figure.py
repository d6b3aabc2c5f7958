"""Draws curves.png and variants.png from the CSV files beside it, and prints the points as tables: python results/figure.py
(needs matplotlib).

A panel a game: colours are settings, dashes further seeds; thin gray lines are the published PPO runs of
published_ppo.csv.
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
CURVES = {  # {setting: colour, label}
    "ppg": ("C0", "PPG, one network, N_pi 8"),
    "always": ("C2", "PPG, --detach-value always"),
    "ppg-32": ("C5", "PPG, one network, N_pi 32"),
    "ppg-dual": ("C8", "PPG, two networks, N_pi 8"),
    "ppg-dual-32": ("C9", "PPG, two networks, N_pi 32"),
    "ppo": ("C1", "PPO, this script's"),
    "ppo-clipped": ("C6", "PPO, gradients clipped"),
    "cleanrl": ("C4", "CleanRL's PPG, N_pi 32"),
}
VARIANTS = {
    "ppo": CURVES["ppo"],
    "ppo-clipped": CURVES["ppo-clipped"],
    "ppo-baselines": ("C3", "PPO, Baselines' choices"),
    "ppo-segments": ("C9", "PPO, minibatches of segments"),
    "ppg": CURVES["ppg"],
    "ppg-segments": ("C7", "PPG, minibatches of segments"),
}
NAMES = {"starpilot": "StarPilot", "fruitbot": "FruitBot"}
HALF = 2  # rollouts before and after each that its mean takes in, as in the published numbers; fewer at the ends
EVERY = 131_072  # steps from one published number to the next


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(file, settings, published_to, ours_to=float("inf")):
    """One figure and its table; the published runs up to so many steps, ours likewise."""
    figure, panels = plt.subplots(1, len(runs), figsize=(11, 5), layout="constrained")
    lines = {}  # {label: a line of its colour}
    for panel, (game, of_game) in zip(panels, sorted(runs.items(), reverse=True), strict=True):
        published = defaultdict(dict)
        for row in read(HERE / "published_ppo.csv"):
            if row["game"] == game and int(row["step"]) <= published_to:
                published[row["run"]][int(row["step"])] = float(row["return"])
        for curve in published.values():
            x, y = np.array(list(curve)) / 1e6, curve.values()
            lines["published PPO (Baselines), 3 runs"] = panel.plot(x, y, color="0.6", lw=0.9)[0]
        curves = {}
        for setting, (color, label) in settings.items():
            for seed in (name for name in sorted(of_game) if name in (setting, f"{setting}-2", f"{setting}-3")):
                curves[seed] = {step: mean for step, mean in of_game[seed].items() if step <= ours_to}
                line = "-" if seed == setting else "--"
                x, y = np.array(list(curves[seed])) / 1e6, curves[seed].values()
                lines.setdefault(label, panel.plot(x, y, color=color, ls=line, lw=1.7)[0])
        panel.set(
            title=f"{NAMES[game]}, easy, all levels", xlabel="million environment steps", ylabel="mean episodic return"
        )
        panel.spines[["top", "right"]].set_visible(False)

        print(game, *curves, "published", sep="\t")
        for step in range(EVERY, max(map(max, curves.values())) + 1, EVERY):
            ours = [f"{curve[step]:.2f}" if step in curve else "" for curve in curves.values()]
            theirs = [curve[step] for curve in published.values() if step in curve]
            print(f"{step:,}", *ours, f"{min(theirs):.1f} to {max(theirs):.1f}" if theirs else "", sep="\t")
    lines["further seeds"] = plt.Line2D([], [], color="0.3", ls="--", lw=1.7)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(HERE / file, dpi=110)


runs = defaultdict(dict)  # {game: {run: {step: mean return}}}
for path in sorted(HERE.glob("*-*.csv")):
    points = [(int(row["step"]), float(row["episodic_return"])) for row in read(path) if row["episodic_return"]]
    game, name = path.stem.split("-", 1)
    steps, returns = np.array(points).T
    means = [returns[max(0, i - HALF) : i + HALF + 1].mean() for i in range(len(returns))]
    runs[game][name] = dict(zip(steps.astype(int), means, strict=True))
draw("curves.png", CURVES, published_to=4.3e6)
draw("variants.png", VARIANTS, published_to=1.1e6, ours_to=1.1e6)
