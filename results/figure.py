"""Draws curves.png and variants.png from the CSV files beside it, and prints the points as tables: python results/figure.py
(needs matplotlib).

A panel a game: colours are settings, dashes further seeds; thin lines are the published runs, PPO in gray, PPG
dotted, of published_ppo.csv (easy) and published_hard.csv.
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
    "cleanrl": ("k", "CleanRL's PPG, N_pi 32"),
}
VARIANTS = {
    "ppo": CURVES["ppo"],
    "ppo-clipped": CURVES["ppo-clipped"],
    "ppo-baselines": ("C3", "PPO, Baselines' choices (StarPilot: three)"),
    "ppo-segments": ("C9", "PPO, minibatches of segments"),
    "ppg": CURVES["ppg"],
    "ppg-segments": ("C7", "PPG, minibatches of segments"),
}
PUBLISHED = {  # {algorithm: colour, label}
    "ppo": ("0.6", "published PPO, 3 runs"),
    "ppgsingle": ("C5", "published PPG, one network, N_pi 32, 3 runs"),
    "ppg": ("C9", "published PPG, two networks, N_pi 32, 3 runs"),
}
NAMES = {  # {game: title}
    "starpilot": "StarPilot, easy, all levels",
    "fruitbot": "FruitBot, easy, all levels",
    "bigfish": "BigFish, hard, all levels, 256 environments",
}
HALF = 2  # rollouts before and after each that its mean takes in, as in the published numbers; fewer at the ends
EVERY = 131_072  # steps from one published number to the next


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(file, settings, published_to, ours_to=float("inf")):
    """One figure and its table; the published runs up to so many steps, ours likewise."""
    games = [game for game in NAMES if settings.keys() & runs[game].keys()]
    figure, panels = plt.subplots(1, len(games), figsize=(5.5 * len(games), 5.5), layout="constrained")
    lines = {}  # {label: a line of its colour}
    for panel, game in zip(panels, games, strict=True):
        published = defaultdict(dict)  # {(algorithm, run): {step: return}}
        for row in read(HERE / "published_ppo.csv") + read(HERE / "published_hard.csv"):
            if row["game"] == game and int(row["step"]) <= published_to:
                published[row.get("algorithm", "ppo"), row["run"]][int(row["step"])] = float(row["return"])
        for (algorithm, _), curve in published.items():
            color, label = PUBLISHED[algorithm]
            x, y = np.array(list(curve)) / 1e6, curve.values()
            lines[label] = panel.plot(x, y, color=color, ls="-" if algorithm == "ppo" else ":", lw=0.9)[0]
        curves = {}
        for setting, (color, label) in settings.items():
            for seed in (name for name in sorted(runs[game]) if name in (setting, f"{setting}-2", f"{setting}-3")):
                curves[seed] = {step: mean for step, mean in runs[game][seed].items() if step <= ours_to}
                line = "-" if seed == setting else "--"
                x, y = np.array(list(curves[seed])) / 1e6, curves[seed].values()
                lines.setdefault(label, panel.plot(x, y, color=color, ls=line, lw=1.7)[0])
        panel.set(title=NAMES[game], xlabel="million environment steps", ylabel="mean episodic return")
        panel.spines[["top", "right"]].set_visible(False)

        print(game, *curves, *(f"published {name}" for name in PUBLISHED), sep="\t")
        for step in range(EVERY, max(map(max, curves.values())) + 1, EVERY):
            ours = [f"{curve[step]:.2f}" if step in curve else "" for curve in curves.values()]
            for algorithm in PUBLISHED:
                theirs = [curve[step] for (name, _), curve in published.items() if name == algorithm and step in curve]
                ours.append(f"{min(theirs):.2f} to {max(theirs):.2f}" if theirs else "")
            print(f"{step:,}", *ours, sep="\t")
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
draw("curves.png", CURVES, published_to=5.3e6)
draw("variants.png", VARIANTS, published_to=1.1e6, ours_to=1.1e6)
