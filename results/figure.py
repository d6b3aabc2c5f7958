"""Draws curves.png and questions.png from the CSV files beside it, and prints their points: python results/figure.py
(needs matplotlib).

A point is the mean of five rollouts. A line is the mean over a setting's runs, and its band spans them. A run that is
shorter than the others of its setting is a thin line of its own. A run that has no CSV file yet is left out.
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
BLUE, VERMILION, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "0.4"  # can be told apart by colour-blind readers
CORE_HOURS = {"starpilot-ppg": 5.3, "starpilot-ppo": 3.3}  # processor time of the first 2,097,152 steps
RETURN_RANGES = {"starpilot": (2.5, 64), "fruitbot": (-1.5, 32.4)}  # easy levels: a normalised return of 0 and of 1
EVERY = 131_072  # steps from one published point to the next


def read(name):
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def ours(*names):
    """The smoothed curves {step: return} of our runs. Near a run's ends, fewer than five rollouts are averaged."""
    curves = []
    for name in names:
        if (HERE / f"{name}.csv").exists():
            rows = [row for row in read(f"{name}.csv") if row["episodic_return"]]
            returns = [float(row["episodic_return"]) for row in rows]
            means = [np.mean(returns[max(0, i - 2) : i + 3]) for i in range(len(returns))]
            curves.append(dict(zip((int(row["step"]) for row in rows), means)))
    return curves


def published(game, algorithm="ppo", until=2_200_000):
    """The published curves {step: return}, which are smoothed already."""
    curves = defaultdict(dict)
    for row in read("published_ppo.csv") + read("published_hard.csv"):
        if (row["game"], row.get("algorithm", "ppo")) == (game, algorithm) and int(row["step"]) <= until:
            curves[row["run"]][int(row["step"])] = float(row["return"])
    return list(curves.values())


def draw(panel, curves, color, label="", place="above", unit=1e6):
    """Draw the curves of one setting, with the label at the end of their mean: above it, right of it, or so many points
    below it."""
    if not curves:
        return
    length = max(max(curve) for curve in curves)
    for curve in curves:
        if max(curve) < length:
            panel.plot(np.array(list(curve)) / unit, list(curve.values()), color=color, lw=1)
    whole = [curve for curve in curves if max(curve) == length]
    steps = np.array(sorted(set.intersection(*map(set, whole))))
    values = np.array([[curve[step] for step in steps] for curve in whole])
    panel.plot(steps / unit, values.mean(0), color=color, lw=2.2)
    if len(whole) > 1:
        panel.fill_between(steps / unit, values.min(0), values.max(0), color=color, alpha=0.25, lw=0)
    x, y = steps[-1] / unit, values[:, -1]
    if place == "right":
        end, offset, ha, va = y.mean(), (5, 2), "left", "top"
    elif place == "above":
        end, offset, ha, va = y.max(), (0, 5), "right", "bottom"
    else:
        end, offset, ha, va = y.min(), (0, -place), "right", "top"
    panel.annotate(label, (x, end), xytext=offset, textcoords="offset points", color=color, ha=ha, va=va)


def draw_curves():
    figure, (starpilot, fruitbot, hours) = plt.subplots(1, 3, figsize=(10, 4), layout="constrained")
    draw(starpilot, published("starpilot"), GRAY, "published PPO", 78)
    draw(starpilot, ours("starpilot-ppo"), VERMILION, "our PPO", 61)
    draw(starpilot, ours("starpilot-ppg", "starpilot-ppg-2"), BLUE, "PPG")
    draw(fruitbot, published("fruitbot"), GRAY, "published PPO", 122)
    draw(fruitbot, ours("fruitbot-ppo", "fruitbot-ppo-2"), VERMILION, "our PPO", 80)
    draw(fruitbot, ours("fruitbot-ppg", "fruitbot-ppg-2"), BLUE, "PPG")
    for panel, game in (starpilot, "starpilot"), (fruitbot, "fruitbot"):
        low, high = RETURN_RANGES[game]
        to_normalised, to_return = lambda y, a=low, b=high: (y - a) / (b - a), lambda z, a=low, b=high: a + z * (b - a)
        axis = panel.secondary_yaxis("right", functions=(to_normalised, to_return), color=GRAY)
        axis.set_yticks(np.arange(0, 0.9, 0.2 if game == "fruitbot" else 0.1))
        axis.set_ylabel("normalised")
        panel.set(xlim=(0, 2.2), xticks=[0, 1, 2], xlabel="million steps")
    for name, color, label in ("starpilot-ppo", VERMILION, "our PPO"), ("starpilot-ppg", BLUE, "PPG"):
        draw(hours, ours(name), color, label, unit=2_097_152 / CORE_HOURS[name])
    starpilot.set(title="StarPilot", ylabel="mean return", ylim=(0, 31))
    fruitbot.set(title="FruitBot", ylim=(-4, 28))
    hours.set(title="StarPilot per hour", xlim=(0, 5.8), xticks=[0, 2, 4], ylim=(0, 31), xlabel="core hours")
    save(figure, "curves.png")


def draw_questions():
    figure, panels = plt.subplots(3, 3, figsize=(10, 9.6), layout="constrained")
    e_pi, e_aux, n_pi, networks, gradient, clipping, minibatches, bigfish, starpilot = panels.flat
    ppg, ppo = ours("fruitbot-ppg", "fruitbot-ppg-2"), ours("fruitbot-ppo", "fruitbot-ppo-2")
    for panel in (e_pi, e_aux, n_pi, networks, gradient, clipping):
        draw(panel, published("fruitbot"), GRAY)
        panel.set(xlim=(0, 2.2), xticks=[0, 1, 2], ylim=(-6, 29))

    e_pi.set_title("policy epochs")
    draw(e_pi, ours("fruitbot-e-pi-3"), VERMILION, "E_pi 3", "right")
    draw(e_pi, ppg, BLUE, "E_pi 1")

    e_aux.set_title("auxiliary epochs")
    draw(e_aux, ours("fruitbot-e-aux-1"), VERMILION, "E_aux 1", "right")
    draw(e_aux, ours("fruitbot-e-aux-3"), GREEN, "E_aux 3", "right")
    draw(e_aux, ppg, BLUE, "E_aux 6")

    n_pi.set_title("rollouts in a phase")
    draw(n_pi, ours("fruitbot-n-pi-2"), GREEN, "N_pi 2", "right")
    draw(n_pi, ours("fruitbot-ppg-32"), VERMILION, "N_pi 32")
    draw(n_pi, ppg, BLUE, "N_pi 8")

    networks.set_title("networks")
    draw(networks, ppg, BLUE, "one")
    draw(networks, ours("fruitbot-ppg-dual"), VERMILION, "two")

    gradient.set_title("auxiliary value gradient")
    draw(gradient, ppg, BLUE, "into the encoder")
    draw(gradient, ours("fruitbot-always", "fruitbot-always-2"), VERMILION, "into the head", 68)

    clipping.set_title("PPO's gradients")
    draw(clipping, ppo, VERMILION, "not clipped", 60)
    draw(clipping, ours("fruitbot-ppo-clipped", "fruitbot-ppo-clipped-2"), BLUE, "clipped")

    minibatches.set(title="StarPilot PPO, minibatches", ylim=(1, 6), xlim=(0, 0.6), xticks=[0, 0.2, 0.4, 0.6])
    draw(minibatches, published("starpilot", until=600_000), GRAY)
    draw(minibatches, ours("starpilot-ppo-segments"), VERMILION, "segments", 56)
    single = {step: value for step, value in ours("starpilot-ppo")[0].items() if step <= 600_000}
    draw(minibatches, [single], BLUE, "transitions", 78)

    bigfish.set(title="hard BigFish", xlim=(0, 5.4), xticks=[0, 2, 4], ylim=(0, 2.5))
    draw(bigfish, published("bigfish", until=5_300_000), GRAY)
    draw(bigfish, published("bigfish", "ppgsingle", 5_300_000), VERMILION, "authors'")
    draw(bigfish, ours("bigfish-ppg-32"), BLUE, "ours")

    starpilot.set(title="StarPilot", xlim=(0, 2.2), xticks=[0, 1, 2], ylim=(0, 31))
    draw(starpilot, published("starpilot"), GRAY)
    draw(starpilot, ours("starpilot-ppo-clipped"), VERMILION, "clipped PPO", "right")
    draw(starpilot, ours("starpilot-ppg-32"), GREEN, "N_pi 32", "right")
    draw(starpilot, ours("starpilot-ppg", "starpilot-ppg-2"), BLUE, "PPG")
    save(figure, "questions.png")


def save(figure, name):
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / name, dpi=160)


def print_points():
    """Print the points of every run, at the steps of the published ones, and the range of the published runs."""
    for path in sorted(HERE.glob("*-*.csv")):
        points = ours(path.stem)[0]
        print(
            path.stem,
            *(f"{step / 1e6:.2f}M {mean:.2f}" for step, mean in points.items() if step % EVERY == 0),
            sep="  ",
        )
    for game in ("starpilot", "fruitbot"):
        print(f"published PPO, {game}", end="")
        curves = published(game)
        for step in curves[0]:
            values = [curve[step] for curve in curves]
            print(f"  {step / 1e6:.2f}M {min(values):.1f} to {max(values):.1f}", end="")
        print()


plt.rcParams.update({"font.size": 14.4, "axes.titlesize": 14.4})  # 12 points where the figure is shown 800 pixels wide
draw_curves()
draw_questions()
print_points()
