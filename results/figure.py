"""Draws results/curves.png from the CSV files beside it, and prints its points as a table: python results/figure.py
(needs matplotlib).

One panel a game; thick lines are this repository's runs, thin gray ones the published PPO runs of published_ppo.csv.
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
STYLES = {  # {run: colour, line, label}
    "ppg": ("C0", "-", "PPG, one network"),
    "ppo": ("C1", "-", "PPO row"),
    "ppo-2": ("C1", "--", "PPO row, seed 2"),
    "ppo-clipped": ("C6", "-", "PPO row, gradients clipped"),
    "ppo-clipped-2": ("C6", "--", None),  # seed 2
    "ppg-2": ("C0", "--", "PPG, one network, seed 2"),
    "always": ("C2", "-", "PPG, --detach-value always"),
    "ppg-32": ("C5", "-", "PPG, --n-pi 32"),
    "cleanrl": ("C4", "-", "CleanRL's PPG (N_pi 32)"),
    "ppg-segments": ("C0", ":", "PPG, whole segments"),
    "ppo-segments": ("C1", ":", "PPO row, whole segments"),
    "ppo-baselines": ("C3", ":", "PPO row, Baselines' choices"),
    "ppo-baselines-2": ("C3", ":", None),  # its other seeds
    "ppo-baselines-3": ("C3", ":", None),
}
HALF = 2  # rollouts before and after each that its mean takes in, as in the published numbers; fewer at the ends
EVERY = 131_072  # steps from one published number to the next


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


runs = defaultdict(dict)  # {game: {run: {step: mean return}}}
for path in sorted(HERE.glob("*-*.csv")):
    points = [(int(row["step"]), float(row["episodic_return"])) for row in read(path) if row["episodic_return"]]
    game, name = path.stem.split("-", 1)
    steps, returns = np.array(points).T
    means = [returns[max(0, i - HALF) : i + HALF + 1].mean() for i in range(len(returns))]
    runs[game][name] = dict(zip(steps.astype(int), means, strict=True))

figure, panels = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 4.8), squeeze=False)
for panel, (game, curves) in zip(panels[0], sorted(runs.items(), reverse=True), strict=True):
    last = max(max(curve) for curve in curves.values())
    published = defaultdict(dict)
    for row in read(HERE / "published_ppo.csv"):
        if row["game"] == game and int(row["step"]) <= 1.1 * last:
            published[row["run"]][int(row["step"])] = float(row["return"])
    for run, curve in published.items():
        label = "published PPO (3 runs)" if run == "0" else None
        panel.plot(np.array(list(curve)) / 1e6, curve.values(), color="0.65", lw=0.8, label=label)
    for name, curve in curves.items():
        color, line, label = STYLES[name]
        panel.plot(np.array(list(curve)) / 1e6, curve.values(), color=color, ls=line, lw=1.8, label=label)
    panel.set(title=f"{game}, easy, all levels", xlabel="million environment steps", ylabel="mean episodic return")
    panel.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    panel.spines[["top", "right"]].set_visible(False)

    print(game, *curves, "published", sep="\t")
    for step in range(EVERY, last + 1, EVERY):
        ours = [f"{curve[step]:.2f}" if step in curve else "" for curve in curves.values()]
        theirs = [curve[step] for curve in published.values() if step in curve]
        print(f"{step:,}", *ours, f"{min(theirs):.1f} to {max(theirs):.1f}" if theirs else "", sep="\t")
figure.tight_layout()
figure.savefig(HERE / "curves.png", dpi=110)
