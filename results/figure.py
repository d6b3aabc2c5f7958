"""Draws results/curves.png from the CSV files beside it: python results/figure.py (needs matplotlib).

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
    "always": ("C2", "-", "PPG, --detach-value always"),
    "cleanrl": ("C4", "-", "CleanRL's PPG"),
    "ppg-segments": ("C0", ":", "PPG, minibatches of whole segments"),
    "ppo-segments": ("C1", ":", "PPO row, minibatches of whole segments"),
    "ppo-baselines": ("C3", ":", "PPO row, all of Baselines' choices"),
}
SMOOTH = 8  # rollouts that the running mean takes in


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


runs = defaultdict(dict)  # {game: {run: (steps, returns)}}
for path in sorted(HERE.glob("*-*.csv")):
    points = [(int(row["step"]), float(row["episodic_return"])) for row in read(path) if row["episodic_return"]]
    game, name = path.stem.split("-", 1)
    steps, returns = np.array(points).T
    means = [returns[max(0, i + 1 - SMOOTH) : i + 1].mean() for i in range(len(returns))]
    runs[game][name] = steps, means

figure, panels = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 4), squeeze=False)
for panel, (game, curves) in zip(panels[0], sorted(runs.items(), reverse=True), strict=True):
    last = max(steps[-1] for steps, _ in curves.values())
    published = [
        row for row in read(HERE / "published_ppo.csv") if row["game"] == game and int(row["step"]) <= 1.1 * last
    ]
    for run in sorted({row["run"] for row in published}):
        points = [(int(row["step"]) / 1e6, float(row["return"])) for row in published if row["run"] == run]
        panel.plot(
            *zip(*points, strict=True), color="0.65", lw=0.8, label=None if run != "0" else "published PPO (3 runs)"
        )
    for name, (steps, means) in curves.items():
        color, line, label = STYLES[name]
        panel.plot(steps / 1e6, means, color=color, ls=line, lw=1.8, label=label)
    panel.set(title=f"{game}, easy, all levels", xlabel="million environment steps", ylabel="mean episodic return")
    panel.legend(frameon=False, fontsize=9, loc="upper left")
    panel.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(HERE / "curves.png", dpi=110)
