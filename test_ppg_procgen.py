"""Tests of ppg_procgen.py: each docstring is the claim. Procgen, TensorBoard files, processes and signals are real."""

import contextlib
import hashlib
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice, pairwise
from pathlib import Path
from unittest.mock import Mock

import imageio
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributions import Categorical
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ppg_procgen as ppg

gym = ppg.gym
SCRIPT = Path(ppg.__file__)
README = SCRIPT.with_name("README.md")
OF_SCRIPT = rf"(?:{SCRIPT.name}: |warning: |.*File \"{SCRIPT}\").*"  # its own lines among torchrun's
PROCESSES = []
# One phase: two rollouts of 32 steps and an auxiliary phase. Chaser rewards a random policy within a few steps.
SMALL = (
    "--env-id chaser --arch shared --num-envs 4 --num-steps 8 --num-minibatches 2 --n-pi 2 --e-aux 1"
    " --num-aux-minibatches 2 --total-timesteps 64 --device cpu"
)
ROLLOUT, PHASE = 32, 64


def parse(flags):
    return ppg.parse_args(shlex.split(flags))


FLAGS = {f"--{name.replace('_', '-')}" for name in vars(parse(""))}


def train(flags):
    """A run, or more of one, in this process -> its agent."""
    args = parse(flags)
    with ppg.run_directory(args) as run_dir:
        # TensorBoard reads the event files of a directory in the order of the seconds in their names.
        while list(run_dir.glob(f"events.*.{int(time.time())}.*")):
            time.sleep(0.05)
        return ppg.train(args, run_dir)


def refused(flags, words, capsys):
    """A run in this process ends with exit status 2 and one line on stderr with these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(flags)
    output, errors = capsys.readouterr()
    assert (stopped.value.code, output, errors.count("\n")) == (2, "", 1) and words in errors, errors


def start(flags, script=SCRIPT, processes=1, **options):
    """The script as a process, or as several by torchrun, in a session of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), script, *shlex.split(flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": SCRIPT.parent}
    PROCESSES.append(subprocess.Popen(command, **{**pipes, "start_new_session": True, **options}))
    return PROCESSES[-1]


@pytest.fixture(autouse=True)
def around_each_test():
    """Torch's random numbers do not depend on earlier tests; no process outlives its test, a torchrun ends its own."""
    torch.manual_seed(0)
    yield
    while PROCESSES:
        PROCESSES[-1].terminate()
        PROCESSES.pop().send_signal(signal.SIGCONT)


def read_until(process, *beginnings):
    """Read a process's stdout up to lines that begin so, one after the other."""
    for beginning in beginnings:
        while not (line := process.stdout.readline()).startswith(beginning):
            assert line, f"no line {beginning!r}; stderr: {process.stderr.read()}"


def finish(process, lines=".+", within=240):
    """Wait for a process -> its exit status, its further lines of stdout, its lines of stderr that look so."""
    output, errors = process.communicate(timeout=within)
    print(errors)  # pytest shows it where a test fails
    return process.returncode, output.splitlines(), re.findall(f"^{lines}", errors, re.MULTILINE)


def events(run_dir):
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()


def scalars(run_dir):
    """TensorBoard's scalars of a run: {tag: {step: value}}."""
    loaded = events(run_dir)
    return {tag: {e.step: e.value for e in loaded.Scalars(tag)} for tag in loaded.Tags()["scalars"]}


def untimed(run_dir):
    """The scalars of a run that do not tell times."""
    return {tag: s for tag, s in scalars(run_dir).items() if tag != "charts/SPS" and not tag.startswith("time/")}


def flat(value, path="checkpoint"):
    """Nested containers -> {path: value}, tensors as their type, shape and hash."""
    if isinstance(value, torch.Tensor):
        return {path: (value.dtype, tuple(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest())}
    if not isinstance(value, (dict, list, tuple)):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for key, part in items for name, leaf in flat(part, f"{path}.{key}").items()}


def weights(run_dir):
    return flat(ppg.load_agent(run_dir / "agent.pt")[0].state_dict(), "agent")


def content(run_dir):
    """All that two equal runs have in common, bit by bit: the checkpoint, the weights and the scalars."""
    path, data = ppg.load_checkpoint(run_dir)
    assert path == Path(run_dir, "checkpoint.pt")
    for name in ("run_dir", "total_timesteps", "checkpoint_every"):
        del data["args"][name]
    return flat(data) | weights(run_dir) | flat(untimed(run_dir), "log")


def files(run_dir):
    """The content of a run directory's checkpoints and weights, by name."""
    return {file.name: file.read_bytes() for file in Path(run_dir).glob("*.p*")}


def edit(path, change):
    data = torch.load(path, weights_only=True)
    change(data)
    ppg.save(path, data)


@pytest.fixture
def record(monkeypatch):
    """Every update of a run: its data, their storage, minibatches; each step's optimizer, gradients, weights before."""
    updates, real = [], ppg.minibatches

    def recording(data, *rest):
        copies = {name: x.clone() for name, x in data.items()}
        updates.append({"data": copies, "storage": data["obs"].untyped_storage(), "batches": [], "steps": []})
        for epoch, batch in real(data, *rest):
            updates[-1]["batches"].append(batch)
            yield epoch, batch

    def before_step(optimizer, *_):
        parameters = optimizer.param_groups[0]["params"]
        gradients = [p.grad if p.grad is None else p.grad.clone() for p in parameters]
        step = {"optimizer": optimizer, "gradients": gradients, "weights": [p.detach().clone() for p in parameters]}
        updates[-1]["steps"].append(step)

    monkeypatch.setattr(ppg, "minibatches", recording)
    hook = register_optimizer_step_pre_hook(before_step)
    yield updates
    hook.remove()


@pytest.fixture(scope="module")
def two_phases(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two_phases")
    train(f"{SMALL} --run-dir {run_dir} --total-timesteps {2 * PHASE}")
    return run_dir


@pytest.fixture
def run_dir(two_phases, tmp_path):
    """A run of two phases, of the test's own."""
    return shutil.copytree(two_phases, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The content of an uninterrupted run of three phases."""
    run_dir = tmp_path_factory.mktemp("whole")
    train(f"{SMALL} --run-dir {run_dir} --total-timesteps {3 * PHASE}")
    return content(run_dir)


class Quadrants(gym.vector.VectorEnv):
    """The bright quadrant names the right action of 4, each 2nd step pays for the one before. Episodes of environment n
    have length + n * stagger steps and images of their own; in every second their end is called truncated."""

    def __init__(self, num_envs, length=4, stagger=0, scale=0, size=32, first=0):
        super().__init__(num_envs, gym.spaces.Box(0, 255, (size, size, 3), np.uint8), gym.spaces.Discrete(4))
        self.numbers = first + np.arange(num_envs)
        self.lengths, self.pay = length + stagger * self.numbers, 1.0 + scale * self.numbers
        self.randoms, self.half = [np.random.default_rng(n) for n in self.numbers], size // 2
        self.ended, self.clock = [], 0  # of every episode: the step that ended it, its return, its length

    def draw(self):
        self.target, half = np.array([random.integers(4) for random in self.randoms]), self.half
        images = np.stack([random.integers(0, 128, (2 * half, 2 * half, 3), np.uint8) for random in self.randoms])
        for image, (row, column) in zip(images, zip(*divmod(self.target, 2))):
            image[half * row : half * (row + 1), half * column : half * (column + 1)] += 128
        return images

    def reset(self):
        self.steps, self.right = np.zeros(self.num_envs, int), np.zeros(self.num_envs, bool)
        self.totals = np.zeros(self.num_envs)
        return self.draw(), {}

    def step(self, actions):
        self.steps, self.clock = self.steps + 1, self.clock + 1
        rewards = self.pay * (self.right & (self.steps % 2 == 0))
        self.right, self.totals = actions == self.target, self.totals + rewards
        ends, called_truncated = self.steps == self.lengths, self.numbers % 2 == 1
        self.ended += [(self.clock, self.totals[n], self.steps[n]) for n in np.flatnonzero(ends)]
        self.steps[ends] = self.totals[ends] = 0
        return self.draw(), rewards, ends & ~called_truncated, ends & called_truncated, {}


# ----------------------------------------------------------------------------------------------------------------- math


def random_batch(size):
    """A flat batch with all that either loss needs, for 5 actions."""
    batch = {name: torch.randn(size) for name in ("advantages", "targets")}
    batch |= {"actions": torch.randint(0, 5, (size,)), "old_logits": torch.randn(size, 5)}
    batch["obs"] = torch.randint(0, 256, (size, 8, 8, 3), dtype=torch.uint8)
    batch["logprobs"] = Categorical(logits=batch["old_logits"]).log_prob(batch["actions"])
    return batch


def test_gae_is_its_definition():
    """A_t is the sum of (gamma lambda)^l delta_{t+l} up to the episode's end, and V^targ is A + V."""
    N, T, gamma, gae_lambda = 5, 12, 0.9, 0.8
    rewards, values, dones = torch.randn(N, T), torch.randn(N, T + 1), (torch.rand(N, T) < 0.25).float()
    expected = torch.zeros(N, T)
    deltas = rewards + gamma * (1 - dones) * values[:, 1:] - values[:, :-1]
    for n, t, k in np.ndindex(N, T, T):
        if k >= t:
            expected[n, t] += (gamma * gae_lambda) ** (k - t) * (1 - dones[n, t:k]).prod() * deltas[n, k]
    advantages, targets = ppg.compute_gae(rewards, values, dones, gamma, gae_lambda)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(targets, expected + values[:, :-1])


@pytest.mark.parametrize("arch", ["dual", *(f"shared --detach-value {d}" for d in ("policy", "always", "never"))])
@pytest.mark.parametrize("clip_coef, kl_coef", [(0.1, 0), (0, 0), (0.1, 0.4)])
def test_losses_are_those_of_the_paper(arch, clip_coef, kl_coef):
    """Policy phase: -L^clip + kl_coef * 1/2 log^2 - beta_S * entropy + L^value; auxiliary: L^aux + beta_clone *
    KL[pi_old, pi] + L^value. What is logged are their parts. They have the gradients of these losses in every
    parameter, where L^value trains the value encoder, or a shared one in the phases that --detach-value leaves."""
    args = parse(f"--arch {arch} --ent-coef 0.3 --beta-clone 0.7 --clip-coef {clip_coef} --kl-coef {kl_coef}")
    agent, batch = ppg.Agent((8, 8, 3), 5, args.arch), random_batch(12)
    features = agent.policy_encoder(batch["obs"])
    value_features = agent.value_encoder(batch["obs"]) if arch == "dual" else features
    logits = agent.policy_head(features)
    outputs = agent.aux_value_head(features), agent.value_head(value_features), agent.value_head(features.detach())
    old, new = (Categorical(logits=x) for x in (batch["old_logits"], logits))
    log_ratio = new.log_prob(batch["actions"]) - batch["logprobs"]
    ratio, entropy, kl = log_ratio.exp(), new.entropy().mean(), torch.distributions.kl_divergence(old, new).mean()
    surrogate, clipped = ratio * batch["advantages"], ratio.clamp(1 - clip_coef, 1 + clip_coef) * batch["advantages"]
    if clip_coef:
        surrogate = torch.min(surrogate, clipped)
    policy_loss = -surrogate.mean() + 0.5 * kl_coef * (log_ratio**2).mean()
    aux_value_loss, value_loss, detached = (0.5 * (x.squeeze(-1) - batch["targets"]).square().mean() for x in outputs)
    policy_phase_value_loss = detached if arch.endswith(("policy", "always")) else value_loss
    aux_phase_value_loss = detached if arch.endswith("always") else value_loss
    policy_parts = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    policy_parts |= {"approx_kl": (ratio - 1 - log_ratio).mean()}
    if clip_coef:
        policy_parts["clipfrac"] = ((ratio - 1).abs() > clip_coef).float().mean()
    aux_parts = {"aux/kl_loss": kl, "aux/aux_value_loss": aux_value_loss, "aux/real_value_loss": value_loss}
    for loss_of, expected, parts in (
        (ppg.policy_phase_loss, policy_loss - 0.3 * entropy + policy_phase_value_loss, policy_parts),
        (ppg.auxiliary_phase_loss, aux_value_loss + 0.7 * kl + aux_phase_value_loss, aux_parts),
    ):
        loss, metrics = loss_of(agent, batch, args)
        torch.testing.assert_close(metrics, {f"losses/{name}": value for name, value in parts.items()})
        torch.testing.assert_close(loss, expected)
        weights = [*agent.parameters()]
        gradients = [torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True) for x in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_actions_follow_the_policy():
    """Actions come as often as the policy has it, each with its own log-probability."""
    agent = ppg.Agent((8, 8, 3), 3, "shared")
    agent.policy_head.bias.data = torch.tensor([0.5, 0.3, 0.2]).log()
    actions, logprobs, _ = ppg.act(agent, torch.zeros(20_000, 8, 8, 3, dtype=torch.uint8))
    assert (actions.bincount(minlength=3) / 20_000).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.02)
    assert logprobs.exp()[:50].tolist() == pytest.approx([(0.5, 0.3, 0.2)[a] for a in actions[:50]], rel=1e-4)


def test_reward_normalizer_against_naive():
    """Rewards are divided by the deviation of all discounted returns, this rollout's included, and clipped to +-10."""
    generator = np.random.default_rng(0)
    normalize, running, seen = ppg.RewardNormalizer(3, 0.9), 0, []
    for _ in range(4):
        rewards, dones = generator.normal(size=(3, 400)), generator.random((3, 400)) < 0.2
        rewards[1, 7] = -1000
        for t in range(400):
            running = 0.9 * running + rewards[:, t]
            seen += running.tolist()
            running *= ~dones[:, t]
        count = 1e-4 + len(seen)  # the moments begin as if 1e-4 returns of mean 0 and variance 1 had been seen
        var = (1e-4 + np.square(seen).sum()) / count - (sum(seen) / count) ** 2
        expected = np.clip(rewards / np.sqrt(var + 1e-8), -10, 10)
        actual = normalize(torch.from_numpy(rewards), torch.from_numpy(dones).float())
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        assert expected[1, 7] == -10


@pytest.mark.parametrize("arch, parameters", [("shared", 626_513), ("dual", 1_248_657)])
def test_size_and_initialisation(arch, parameters):
    """The networks have the paper's size; every filter or output row begins with its norm, every bias with 0."""
    agent = ppg.Agent((64, 64, 3), 15, arch)
    assert sum(p.numel() for p in agent.parameters()) == parameters
    for name, layer in agent.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            in_block = (1 / 6**0.5) ** 0.5 if ".conv" in name else 1.0
            norm = 0.1 if "head" in name else 1.4 if "dense" in name else in_block
            norms = layer.weight.flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, torch.full_like(norms, norm))
            assert not layer.bias.any()


def test_vector_interface(monkeypatch):
    """Gym 0.26's spaces and values: a step's reward, Procgen's `first` as terminated; threads do not matter."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    envs = ppg.ProcgenVectorEnv("dodgeball", 8, 1, distribution_mode="easy")
    plain = ppg.ProcgenGym3Env(8, "dodgeball", distribution_mode="easy", rand_seed=1, num_threads=1)
    image = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert envs.single_observation_space == image and envs.single_action_space == gym.spaces.Discrete(15)
    obs, info = envs.reset()
    assert obs.dtype == np.uint8 and (envs.num_envs, info) == (8, {})
    np.testing.assert_array_equal(obs, plain.observe()[1]["rgb"])
    ended = rewarded = 0
    for actions in np.random.default_rng(0).integers(0, 15, (200, 8)):
        obs, rewards, terminated, truncated, info = envs.step(actions)
        plain.act(actions)
        expected_rewards, expected_obs, first = plain.observe()
        for ours, expected in (obs, expected_obs["rgb"]), (rewards, expected_rewards), (terminated, first):
            np.testing.assert_array_equal(ours, expected)
        assert terminated.dtype == truncated.dtype == bool and not truncated.any() and info == {}
        ended, rewarded = ended + terminated.sum(), rewarded + (rewards != 0).sum()
    assert ended and rewarded
    again, _ = envs.reset()  # amid episodes: they end, and new ones begin
    assert envs.procgen.observe()[2].all() and all((a != b).any() for a, b in zip(obs, again))


@pytest.mark.parametrize("game", ppg.GAMES)
def test_every_game_in_every_mode(game):
    """Each of the 16 games makes and steps in all its modes, by the seed, and goes on exactly from a saved state."""
    assert len(ppg.GAMES) == 16
    for mode in ppg.GAMES[game]:
        flags = f"{SMALL} --env-id {game} --distribution-mode {mode}"
        one, other = (ppg.make_envs(parse(flags), 4, seed) for seed in (1, 2))
        actions = np.random.default_rng(0).integers(0, 15, (60, 4))
        frames = [one.reset()[0].copy()] + [one.step(action)[0].copy() for action in actions[:30]]
        assert np.ptp(frames[0]) > 0 and any((frame != frames[0]).any() for frame in frames)
        assert (other.reset()[0] != frames[0]).any() or mode == "exploration"
        other.load_state_dict(one.state_dict())
        for action in actions[30:]:
            for a, b in zip(one.step(action)[:3], other.step(action)[:3]):
                np.testing.assert_array_equal(a, b)
        one.close(), other.close()


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "arch, capabilities, precision", [("shared", {}, "fp32"), ("dual", {"amx_bf16": True}, "bf16")]
)
def test_first_kl_is_zero(tmp_path, monkeypatch, capsys, arch, capabilities, precision):
    """Before the first auxiliary step pi is pi_old: KL is exactly 0, in two chunks and any precision. Where the CPU has
    bf16, auto takes it for the auxiliary phase, elsewhere it is fp32; the first line says so."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    losses = [Mock(wraps=ppg.policy_phase_loss), Mock(wraps=ppg.auxiliary_phase_loss)]
    monkeypatch.setattr(ppg, "policy_phase_loss", losses[0])
    monkeypatch.setattr(ppg, "auxiliary_phase_loss", losses[1])
    flags = f"--arch {arch} --num-steps 128 --n-pi 1 --total-timesteps 512"
    train(f"{SMALL} --run-dir {tmp_path} {flags} --num-aux-minibatches 1")  # 1 auxiliary epoch of 1 minibatch
    assert scalars(tmp_path)["losses/aux/kl_loss"] == {512: 0.0}
    assert f"policy phase fp32, auxiliary phase {precision}" in capsys.readouterr().out.splitlines()[0]
    assert [loss.call_args.args[3] for loss in losses] == [False, precision == "bf16"]


def test_every_sample_once_an_epoch(tmp_path, record):
    """Policy epochs take each transition once, auxiliary epochs each segment that the phase's rollouts saw, each epoch
    in an order of its own; rollouts fill the phase buffer in place."""
    train(f"{SMALL} --run-dir {tmp_path} --e-pi 2 --e-v 2 --e-aux 3")
    first, second, auxiliary = record
    for update, epochs, samples, size in (first, 2, 32, 16), (second, 2, 32, 16), (auxiliary, 3, 8, 2):
        data, order = update["data"], []
        for batch in update["batches"]:
            assert {len(x) for x in batch.values()} == {size}
            rows = [[torch.equal(x, row) for row in data["targets"]].index(True) for x in batch["targets"]]
            assert all(torch.equal(x, data[name][rows]) for name, x in batch.items())
            order += rows
        order = np.reshape(order, (epochs, samples))
        assert (np.sort(order) == range(samples)).all() and len(np.unique(order, axis=0)) == epochs
    for name in ("obs", "targets"):
        whole = torch.cat([first["data"][name], second["data"][name]])
        assert torch.equal(auxiliary["data"][name].flatten(0, 1), whole)
    assert len({update["storage"].data_ptr() for update in record}) == 1


def test_each_step_has_the_gradient_of_its_minibatch(tmp_path, record):
    """Every optimizer step takes the gradient of its own minibatch alone, also where that comes in chunks, the last of
    them shorter; each of the phases has an Adam of its own. Advantages are normalised over the rollout. Logged are the
    means over the policy phase and over the last auxiliary epoch."""
    flags = "--precision fp32 --num-steps 160 --n-pi 1 --e-aux 2 --total-timesteps 640 --aux-learning-rate 3e-4"
    agent = train(f"{SMALL} --run-dir {tmp_path} {flags}")
    args, logged = ppg.load_agent(tmp_path / "agent.pt")[1], scalars(tmp_path)
    for update, loss_of in zip(record, (ppg.policy_phase_loss, ppg.auxiliary_phase_loss), strict=True):
        parts = []
        for batch, step in zip(update["batches"], update["steps"], strict=True):
            for parameter, weights in zip(agent.parameters(), step["weights"]):
                parameter.data, parameter.grad = weights, None
            if "old_logits" in batch:
                batch = {name: x.flatten(0, 1) for name, x in batch.items()}
            loss, metrics = loss_of(agent, batch, args)
            loss.backward()
            gradients = [p.grad for p in agent.parameters()]
            torch.testing.assert_close(gradients, step["gradients"], rtol=1e-3, atol=1e-5)
            parts.append(metrics)
        for tag in parts[0]:  # an epoch has two minibatches
            mean = sum(metrics[tag].item() for metrics in parts[-2:]) / 2
            assert logged[tag] == {640: pytest.approx(mean, rel=1e-3, abs=1e-6)}
    advantages = record[0]["data"]["advantages"]
    assert (advantages.mean().item(), advantages.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-5)
    (policy,), (auxiliary,) = ({step["optimizer"] for step in update["steps"]} for update in record)
    assert (policy.param_groups[0]["lr"], auxiliary.param_groups[0]["lr"]) == (5e-4, 3e-4)


@pytest.mark.parametrize("e_pi, e_v", [(1, 3), (3, 1)])
@pytest.mark.parametrize("arch", ["dual", *(f"shared --detach-value {d}" for d in ("policy", "always", "never"))])
def test_policy_and_value_epochs_apart(tmp_path, record, arch, e_pi, e_v):
    """Parameters take steps in the epochs of their own losses only, and stay as they are, bit for bit, in the others;
    the auxiliary value head in all of the policy phase. With --e-aux 0 the buffer holds one rollout."""
    train(f"{SMALL} --run-dir {tmp_path} --arch {arch} --e-pi {e_pi} --e-v {e_v} --e-aux 0 --num-aux-minibatches 16")
    assert [update["storage"].nbytes() for update in record] == [ROLLOUT * 64 * 64 * 3] * 2
    epochs = {"policy": e_pi, "value": e_v, "aux": 0}
    history = [step["weights"] for update in record for step in update["steps"]][:7]
    agent = ppg.load_agent(tmp_path / "agent.pt")[0]
    for i, (name, _) in enumerate(agent.named_parameters()):
        moves = [not torch.equal(a[i], b[i]) for a, b in pairwise(history)]
        both = "never" in arch and name.startswith("policy_encoder")
        steps = 2 * (max(e_pi, e_v) if both else epochs[name.split("_")[0]])
        assert moves == [True] * steps + [False] * (6 - steps), name


@pytest.mark.parametrize(
    "variant", ["--arch shared", "--arch dual", "--arch shared --detach-value never --e-pi 3 --e-v 3 --e-aux 0"]
)
def test_learning(tmp_path, monkeypatch, variant):
    """PPG with one network, with two, and PPO come from chance to 90 % of the best return in another environment."""
    envs = Quadrants(16)
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: envs)
    train(
        f"--num-envs 16 --num-steps 16 --num-minibatches 4 --num-aux-minibatches 4 --n-pi 4 --e-aux 1 --gamma 0.9"
        f" --learning-rate 1e-3 --aux-learning-rate 1e-3 --total-timesteps 3584 --device cpu"
        f" --run-dir {tmp_path} {variant}"
    )
    returns = [total for _, total, _ in envs.ended]
    assert np.mean(returns[:50]) < 0.5 * 2 and np.mean(returns[-100:]) >= 0.9 * 2


# ---------------------------------------------------------------------------------------------- flags, console, output

EFFECTS = (
    "--env-id starpilot --distribution-mode hard --num-levels 1 --start-level 7 --seed 2 --num-envs 2 --num-steps 4"
    " --total-timesteps 96 --arch dual --detach-value never --learning-rate 1e-3 --gamma 0.5 --gae-lambda 0.5"
    " --reward-norm-gamma 0.5 --num-minibatches 4 --clip-coef 1e-4 --kl-coef 1 --ent-coef 0.1 --n-pi 1 --e-pi 2 --e-v 2"
    " --e-aux 2 --beta-clone 5 --num-aux-minibatches 4 --aux-learning-rate 1e-3 --precision bf16 --checkpoint-every 0"
)
EFFECTS = dict(zip(*[iter(EFFECTS.split())] * 2))  # flag: another value than in SMALL


def observe(run_dir, flags=""):
    """A small run -> its weights, the steps that it logged, its files."""
    train(f"{SMALL} --run-dir {run_dir} {flags}")
    logged = {tag: list(points) for tag, points in scalars(run_dir).items()}
    return weights(run_dir) | logged | dict.fromkeys(files(run_dir))


@pytest.mark.parametrize("flag, value", EFFECTS.items())
def test_every_flag_has_an_effect(tmp_path, flag, value):
    """Every flag alone changes the weights in the end, the steps that are logged or the files that are written;
    --start-level does so with --num-levels. The flags that are not in the list have tests of their own."""
    others = "--exp-name --run-dir --resume --compile --eval-episodes --capture-video --evaluate --agent --device"
    assert FLAGS - EFFECTS.keys() == set(others.split())
    context = "--num-levels 1" if flag == "--start-level" else ""
    assert observe(tmp_path / "with", f"{context} {flag} {value}") != observe(tmp_path / "without", context)


def test_seed_reaches_torch(tmp_path, monkeypatch):
    """The seed is torch's too: with equal environments, two seeds end with different parameters."""
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: Quadrants(4))
    runs = [observe(tmp_path / str(i), f"--seed {seed}") for i, seed in enumerate((1, 1, 2))]
    assert runs[0] == runs[1] != runs[2]


def test_tensorboard(tmp_path, monkeypatch):
    """The tags of the design at each rollout, complete phase and episode's end; all episodes, truncated ones too."""
    envs = Quadrants(4, stagger=3)  # in rollouts of 3 steps; the first has no end of an episode
    envs.return_range = (-1, 3)
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: envs)
    train(f"{SMALL} --run-dir {tmp_path} --num-steps 3 --total-timesteps {64 * 12 + 5}")
    logged, expected = scalars(tmp_path), {}
    returns, steps = [], range(12, 65 * 12 + 1, 12)  # 65 rollouts: rounded up, the last phase incomplete
    for step in steps:
        ended = [episode for clock, *episode in envs.ended if step - 12 < 4 * clock <= step]
        returns += [total for total, _ in ended]
        values = {"charts/episodes": len(ended)}
        if returns:
            values["charts/episodic_return_100"] = np.mean(returns[-100:])
        if ended:
            values["charts/episodic_return"], values["charts/episodic_length"] = np.mean(ended, axis=0)
            values["charts/normalized_return"] = (values["charts/episodic_return"] + 1) / 4
        for tag, value in values.items():
            expected.setdefault(tag, {})[step] = value
    assert len(returns) > 105 and not envs.ended[0][0] <= 3
    for tag, points in expected.items():
        assert logged.pop(tag) == pytest.approx(points)
    rollouts = "charts/SPS charts/learning_rate time/rollout time/policy_phase losses/clipfrac losses/policy_loss"
    rollouts += " losses/value_loss losses/entropy losses/approx_kl losses/explained_variance"
    phases = ["losses/aux/kl_loss", "losses/aux/aux_value_loss", "losses/aux/real_value_loss", "time/auxiliary_phase"]
    assert logged.keys() == {*rollouts.split(), *phases}
    assert all(list(points) == list(steps[1::2] if tag in phases else steps) for tag, points in logged.items())
    text = events(tmp_path).Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"|{flag[2:].replace('-', '_')}|" in text for flag in FLAGS) and "|total_timesteps|773|" in text


def test_time_left(tmp_path, monkeypatch, capsys):
    """`left` is unknown in the first phase, and then goes by the rate of the last, auxiliary phase included. The last
    line has the rate and the shares of all phases after the first."""
    now = [0.0]
    monkeypatch.setattr(ppg.time, "perf_counter", lambda: now[0])
    log = ppg.Log(parse(f"{SMALL} --n-pi 25 --num-steps 1"), tmp_path, 0, 400)
    for phase, (line_at, step, ends_at, rate, left) in enumerate(
        [(30, 50, 60, "2", "?"), (75, 150, 160, "2", "0:02:30"), (170, 250, 200, "1", "0:02:30")], 1
    ):
        log.start_phase()
        now[0] = line_at
        log.add(dict.fromkeys(("losses/approx_kl", "losses/explained_variance"), torch.tensor(0.0)), 1.0)
        log.lap("policy_phase")
        log.write_iteration(phase, step, {"charts/episodes": 0})
        assert capsys.readouterr().out.endswith(f"| {rate} steps/s | left {left}\n")
        now[0] = ends_at
        log.lap("auxiliary_phase")
    log.total = 300
    log.print_summary(tmp_path)
    assert "| 1 steps/s after the first phase | policy phase 18%" in capsys.readouterr().out  # 200 in 140 seconds


@pytest.mark.parametrize("flags, advice", [("32", "64 or --n-pi 1 "), ("33", ""), ("32 --e-aux 0", "")])
def test_below_one_phase(tmp_path, capsys, flags, advice):
    """Steps are rounded up to a rollout; too few for an auxiliary phase, if E_aux > 0, bring a warning with advice."""
    train(f"{SMALL} --run-dir {tmp_path} --total-timesteps {flags}")
    lines, logged = capsys.readouterr().err.splitlines(), scalars(tmp_path)
    assert len(lines) == bool(advice) and all("warning" in x and f"--total-timesteps {advice}" in x for x in lines)
    assert list(logged["charts/SPS"]) == ([ROLLOUT, PHASE] if flags == "33" else [ROLLOUT])
    assert ("losses/aux/kl_loss" in logged) == (flags == "33")


def test_script(tmp_path):
    """The script trains on the real game and prints a line for each rollout and auxiliary epoch; stderr stays empty.
    Its resident memory after 100 rollouts is within 1 % of that after 10."""
    process = start(f"{SMALL} --e-aux 2 --num-steps 4 --total-timesteps {102 * 16} --run-dir {tmp_path}")
    assert "chaser easy, all levels | shared, 626,513 parameters" in process.stdout.readline()
    kilobytes = []
    for rollouts in (10, 90):
        read_until(process, *["step"] * rollouts)
        kilobytes.append(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]))
    status, output, errors = finish(process)
    beginnings = "  auxiliary phase 50, epoch 1.00/2", "  auxiliary phase 50, epoch 2.00/2", "step 1,616/1,632 99.0%"
    beginnings += "step 1,632/1,632 100.0%", "  auxiliary phase 51, epoch 1.00/2", "  auxiliary phase 51", "done in"
    assert (status, errors) == (0, []) and str(tmp_path / "agent.pt") in output[-1]
    assert all(line.startswith(beginning) for line, beginning in zip(output, beginnings, strict=True))
    assert kilobytes[1] == pytest.approx(kilobytes[0], rel=0.01)


def test_runs_in_one_process(tmp_path, monkeypatch):
    """A run leaves its flags as they were, and its directory free for the next one even if it was interrupted and the
    traceback is kept. agent.pt holds the agent and the flags."""
    monkeypatch.chdir(tmp_path)
    args = parse(f"{SMALL} --gamma 0.9 --exp-name mine")
    before = dict(vars(args))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        patch.setattr(ppg.Log, "write_iteration", Mock(side_effect=KeyboardInterrupt))  # background jobs ignore signals
        with ppg.run_directory(args) as first:
            ppg.train(args, first)
    time.sleep(1.1)  # default names have the second
    with ppg.run_directory(args) as second:
        agent = ppg.train(args, second)
    train(f"--resume {first}")
    assert kept.tb and str(first).startswith("runs/chaser__mine__1__") and content(first) == content(second)
    loaded, flags = ppg.load_agent(second / "agent.pt")
    assert vars(args) == before == vars(flags) and flat(loaded.state_dict()) == flat(agent.state_dict())


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "flags, hint",
    [
        ("--env-id starpliot", "did you mean starpilot"),
        ("--env-id bigfish --distribution-mode memory", "easy, hard"),
        ("--num-envs 0", "from 1 to"),
        ("--num-steps 2.5", "--num-steps: 2.5 is not a whole number"),
        ("--num-envs 8 --num-aux-minibatches 16", "--num-envs 8 is not a multiple of --num-aux-minibatches 16"),
        ("--num-minibatches 3", "--num-envs 4 x --num-steps 8 is not a multiple of --num-minibatches 3"),
        ("--evaluate 5", "--agent PATH"),
        ("--evaluate 5 --agent {tmp}/run/agent.pt", "not an agent.pt: missing or damaged"),
        ("--capture-video", "add --eval-episodes"),
        ("--seed -1", "from 0 to"),
        *((f"--gamma {gamma}", "--gamma") for gamma in ("0", "1.001", "nan")),
        ("--gae-lambda 1.5", "from 0 to 1"),
        ("--learning-rate 0", "--learning-rate"),
        *((f"--{name} -0.1", "from 0 to") for name in ("clip-coef", "kl-coef", "ent-coef", "beta-clone")),
        ("--arch dual --detach-value never", "--arch shared"),
        ("--detach-value both", "always"),
        ("--start-level 5", "--num-levels"),
        ("--env-id maze --distribution-mode exploration --num-levels 5", "level of its own"),
        ("--total-timestep 64", "did you mean --total-timesteps"),
        ("--lr 1e-4", "--lr: no such flag, --help lists them\n"),
        ("--device cuda", "--device cpu"),
        ("--run-dir {tmp}/file/below", "{tmp}/file/below"),
        ("--run-dir {tmp}/run", "already holds a run: choose another --run-dir"),
        ("--num-envs 100_000 --total-timesteps 25e6", "take fewer --num-envs"),
        ("--n-pi 20_000 --total-timesteps 25e6", "and 8,000,000,000 are free: --n-pi 16530 is the largest that fits"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, flags, hint):
    """Bad input ends, before an environment is made, with status 2 and one line, on stderr: what would be right."""
    (tmp_path / "run").mkdir()
    (tmp_path / "file").touch(), (tmp_path / "run" / "agent.pt").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ppg, "free_memory", lambda: 8_000_000_000)
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: pytest.fail("environments were made"))
    monkeypatch.chdir(tmp_path)
    refused(f"{SMALL} {flags.format(tmp=tmp_path)}", hint.format(tmp=tmp_path), capsys)


@pytest.mark.parametrize("limit, free", [(None, 1024_000), ("700", 400), ("max", 1024_000), ("9999999", 1024_000)])
def test_free_memory(tmp_path, limit, free):
    """The lesser of MemAvailable and what the cgroup leaves; files that were read (inactive_file) count as free."""
    texts = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 1000 kB\n"}
    if limit:
        group = {"max": limit, "current": "350", "stat": "file 70\ninactive_file 50\n"}
        texts |= {f"sys/fs/cgroup/memory.{name}": text for name, text in group.items()}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert ppg.free_memory(tmp_path) == free


def test_copy_of_the_script(tmp_path):
    """A copy's errors and run directory have its own name. Exceptions but a full disk keep their traceback."""
    copy = tmp_path / "mine.py"
    copy.write_text(SCRIPT.read_text().replace("    envs = make_envs(", "    envs = open('missing')  # "))
    status, _, errors = finish(start(SMALL, copy, cwd=tmp_path))
    assert status == 1 and errors[0].startswith("Traceback") and errors[-1].startswith("FileNotFoundError")
    assert [path.name.split("__")[1] for path in tmp_path.glob("runs/*")] == ["mine"]
    error = "mine.py: error: argument --gamma: 2 is not a number from 1e-12 to 1"
    assert finish(start("--gamma 2", copy)) == (2, [], [error])


@pytest.mark.parametrize(
    "flags, first, last",
    [
        ("--env-id coinrun --arch dual --e-pi 2", PHASE, 2 * PHASE),
        ("--precision fp32 --e-v 2", PHASE + ROLLOUT, 3 * PHASE + ROLLOUT),
        ("--num-levels 20 --start-level 5 --eval-episodes 5", PHASE, 2 * PHASE),
        ("", ROLLOUT, 2 * PHASE),
    ],
)
def test_resume_is_exact(tmp_path, flags, first, last):
    """A run that ended at a phase boundary, or inside, and is extended ends as in one go, with its eval/* scalars."""
    train(f"{SMALL} {flags} --run-dir {tmp_path / 'one_go'} --total-timesteps {last}")
    train(f"{SMALL} {flags} --run-dir {tmp_path / 'extended'} --total-timesteps {first}")
    train(f"--resume {tmp_path / 'extended'} --total-timesteps {last}")
    assert content(tmp_path / "extended") == content(tmp_path / "one_go")


def test_killed_at_any_moment(tmp_path):
    """Killed by SIGKILL at 6 random moments, three of them meant to be while a checkpoint is written, and resumed each
    time, the script ends as if left alone; at each moment a checkpoint is complete."""
    flags, run_dir, generator = f"{SMALL} --num-steps 4 --total-timesteps 512", tmp_path / "killed", random.Random(1)
    train(f"{flags} --run-dir {tmp_path / 'left_alone'}")
    partial_file, while_writing, positions = run_dir / "checkpoint.partial", 0, []
    for kill in range(6):
        if kill % 2:
            partial_file.unlink(missing_ok=True)  # what an earlier kill left; the other runs find it
        process = start(f"{flags} --run-dir {run_dir}" if kill == 0 else f"--resume {run_dir}")
        lines = generator.randrange(4) if kill else 0  # the first kill comes before the first phase boundary
        read_until(process, "chaser", "step", *[""] * lines)
        if kill % 2:
            while process.poll() is None and not partial_file.exists():
                time.sleep(0.0005)
        else:
            time.sleep(generator.uniform(0, 0.1))
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        while_writing += kill % 2 and partial_file.exists()
        positions.append(ppg.load_checkpoint(run_dir)[1]["global_step"])
    assert while_writing >= 2 and positions[0] == 0 and positions == sorted(positions)
    train(f"--resume {run_dir}")
    assert content(run_dir) == content(tmp_path / "left_alone")


@pytest.mark.parametrize(
    "number, status, flags, saved",
    [
        (signal.SIGINT, 130, "", ""),
        (signal.SIGINT, 130, "--checkpoint-every 0", "nothing to resume is saved"),
        (signal.SIGTERM, 143, "--n-pi 40 --total-timesteps 2560", "the first checkpoint comes at step 1,280; continue"),
    ],
)
def test_signals(tmp_path, whole, number, status, flags, saved):
    """Ctrl-C and SIGTERM end a run with 130 and 143 and one line that says up to which step it is saved, with a command
    that really continues it, or that nothing is saved."""
    run_dir = tmp_path / "a run"
    process = start(f"{SMALL} --total-timesteps {3 * PHASE} --run-dir '{run_dir}' {flags}")
    read_until(process, "step", "step", "step")
    process.send_signal(number)
    ended, _, errors = finish(process)
    assert ended == status and len(errors) == 1 and f"{number.name}: " in errors[0] and saved in errors[0]
    if not saved:
        assert f"saved up to step {ppg.load(run_dir / 'checkpoint.pt')['global_step']};" in errors[0]
        subprocess.run(errors[0].partition("continue with: ")[2], shell=True, check=True, cwd=SCRIPT.parent)
        assert content(run_dir) == whole


def test_flags_given_with_resume(run_dir, capsys):
    """With --resume, the flags are the run's, wherever it was moved; they may be given again. Its length, checkpoints
    and evaluation may change. A flag that contradicts them ends in exit status 2 and one line that names it."""
    same = f"--resume {run_dir} --run-dir {run_dir} {SMALL} --learning-rate 0.0005"
    args = parse(f"{same} --total-timesteps 999 --checkpoint-every 3 --device auto --eval-episodes 5 --capture-video")
    assert (args.total_timesteps, args.checkpoint_every, args.num_envs, args.n_pi) == (999, 3, 4, 2)
    assert (args.device, args.eval_episodes, args.capture_video) == ("auto", 5, True)
    args = parse(f"--resume {run_dir}")
    assert (args.total_timesteps, args.checkpoint_every, args.num_envs, args.n_pi) == (2 * PHASE, 1, 4, 2)
    others = EFFECTS | {"--compile": "", "--exp-name": "other", "--run-dir": "elsewhere"}
    for flag in others.keys() - {"--total-timesteps", "--checkpoint-every"}:
        refused(f"--resume {run_dir} {flag} {others[flag]}", f"{flag} ", capsys)


def test_checkpoint_every(tmp_path, capsys):
    """--checkpoint-every K writes a checkpoint at every K-th phase boundary and at the last, 0 none. A fresh run into
    the directory is refused with the flag that resumes it; to resume one that is complete changes nothing."""
    for phases, every, saved in (4, 2, (4, 2)), (5, 2, (5, 4)), (5, 3, (5, 3)):
        flags = f"{SMALL} --n-pi 1 --checkpoint-every {every} --total-timesteps {phases * ROLLOUT}"
        run_dir = tmp_path / f"{phases} {every}"
        train(f"{flags} --run-dir '{run_dir}'")
        assert tuple(ppg.load(run_dir / f"checkpoint.{name}")["phase"] for name in ("pt", "previous.pt")) == saved
    before = files(run_dir)
    refused(f"{flags} --run-dir '{run_dir}'", f"--resume '{run_dir}'", capsys)
    train(f"--resume '{run_dir}'")
    assert "is complete" in capsys.readouterr().out and files(run_dir) == before
    train(f"{SMALL} --run-dir {tmp_path / 'none'} --checkpoint-every 0")
    assert list(files(tmp_path / "none")) == ["agent.pt"]


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("limit", [700, 1_000_000, -1])  # of TensorBoard's file, of agent.pt; -1: a full device
def test_full_disk(run_dir, whole, limit):
    """Where a file of the run cannot be written, the run ends with exit status 1 and one line that says why and how to
    go on; the checkpoint is as it was, and the run can be resumed exactly, over what was left unfinished."""
    before, unfinished = files(run_dir), run_dir / "checkpoint.partial"
    flags = f"--resume {run_dir} --total-timesteps {3 * PHASE}"
    if limit == resource.RLIM_INFINITY:
        unfinished.symlink_to("/dev/full")
    process = start(flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    status, _, errors = finish(process)
    unfinished.unlink(missing_ok=True)
    assert status == 1 and len(errors) == 1
    why = "File too large" if limit > 0 else "No space left on device"
    assert re.search(f"{why}: saved up to step {2 * PHASE}; .* {flags}$", errors[0])  # the length that was asked for
    after = files(run_dir)
    assert all(after[name] == before[name] for name in ("checkpoint.pt", "checkpoint.previous.pt"))
    train(flags)
    assert content(run_dir) == whole


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, 1_000_000), flip_a_bit])
def test_damaged_checkpoint(run_dir, two_phases, capsys, harm):
    """From a damaged checkpoint, --resume goes back to checkpoint.previous.pt, names it in one line, and ends as if
    nothing had happened, with two good files; with both damaged it ends with exit status 2 and one line."""
    harm(run_dir / "checkpoint.pt")
    train(f"--resume {run_dir}")
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "checkpoint.previous.pt" in errors and content(run_dir) == content(two_phases)
    assert ppg.load(run_dir / "checkpoint.previous.pt")["global_step"] == PHASE
    harm(run_dir / "checkpoint.pt"), harm(run_dir / "checkpoint.previous.pt")
    refused(f"--resume {run_dir}", "complete, undamaged checkpoint", capsys)


@pytest.mark.parametrize("error", ["Is a directory", "Weights only load failed"])
def test_unreadable_checkpoint(run_dir, monkeypatch, capsys, error):
    """A checkpoint that is unreadable or holds code is an error, not passed over; no code is run, no file changes."""
    malicious = type("", (), {"__reduce__": lambda _: (os.mkdir, ("code_was_run",))})()
    path, previous = run_dir / "checkpoint.pt", (run_dir / "checkpoint.previous.pt").read_bytes()
    path.unlink()
    if error == "Is a directory":
        path.mkdir()
    else:
        ppg.save(path, {"args": malicious})
    monkeypatch.chdir(run_dir)
    names = sorted(os.listdir(run_dir))
    refused(f"--resume {run_dir}", error, capsys)
    with pytest.raises(Exception, match=error):
        ppg.load_agent(path)
    assert sorted(os.listdir(run_dir)) == names and (run_dir / "checkpoint.previous.pt").read_bytes() == previous


def test_checkpoint_from_elsewhere(run_dir, capsys):
    """A checkpoint that was saved on other hardware resumes with one line that names both; one with other flags than
    the script has ends in exit status 2 and one line that names them."""
    path = run_dir / "checkpoint.pt"
    here = torch.load(path, weights_only=True)["numerics"]
    model = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    assert f"cpu ({model}, {torch.get_num_threads()} threads)" in here and f"torch {torch.__version__}" in here
    edit(path, lambda data: data.update(numerics="cpu (999 threads)"))
    train(f"--resume {run_dir} --total-timesteps {3 * PHASE}")
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "saved on cpu (999 threads)" in errors and here in errors
    edit(path, lambda data: (data["args"].pop("exp_name"), data["args"].update(another_flag=1)))
    refused(f"--resume {run_dir}", "['another_flag', 'exp_name']", capsys)


def test_environment_that_cannot_be_saved(tmp_path, monkeypatch, capsys):
    """An environment without state_dict can be resumed; one line on stderr says that its episodes begin anew, and they
    do: the sums of rewards and the lengths of those under way start at zero."""
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: Quadrants(4, length=1000))
    train(f"{SMALL} --run-dir {tmp_path}")
    capsys.readouterr()
    train(f"--resume {tmp_path} --total-timesteps {2 * PHASE}")
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "begin anew" in errors
    rank = ppg.load_checkpoint(tmp_path)[1]["ranks"][0]
    returns, lengths = rank["episodes"]["under_way"].T
    assert (lengths == 16).all() and 0 < returns.max() <= 8 and (rank["normalize"]["discounted"] <= returns).all()


@pytest.mark.parametrize(
    "part, change, problem",
    [
        ("optimizer", {}, "losses/policy_loss is not finite in policy phase 3, step 160"),
        ("aux_optimizer", {}, "losses/aux/kl_loss is not finite in auxiliary phase 3, step 192"),
        ("optimizer", {"num_minibatches": 1, "e_aux": 0, "n_pi": 1}, "encoder.* is not finite in phase 3, step 160"),
        ("reward", {}, "losses/policy_loss is not finite in policy phase 3, step 160"),
    ],
)
def test_not_finite(run_dir, monkeypatch, part, change, problem):
    """A learning rate that is too large, or a reward that is no number, stops the run, which names the loss or
    parameter that is no number, phase and step; checkpoint and weights stay those of the phase before."""
    observe = ppg.ProcgenGym3Env.observe
    edit(run_dir / "checkpoint.pt", lambda data: data["args"].update(change))
    if part == "reward":
        monkeypatch.setattr(ppg.ProcgenGym3Env, "observe", lambda envs: (observe(envs)[0] * np.nan, *observe(envs)[1:]))
    else:
        edit(run_dir / "checkpoint.pt", lambda data: data[part]["param_groups"][0].update(lr=1e39))
    before = files(run_dir)
    with pytest.raises(ppg.Stopped, match=problem):
        train(f"--resume {run_dir} --total-timesteps {3 * PHASE}")
    assert files(run_dir) == before


def test_compiled_equals_eager(tmp_path, monkeypatch):
    """--compile gives the eager gradients, and None to a network whose epochs are over and to a head without a loss."""

    def keep(agent):
        gradients[-1].append({name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None})

    gradients = []
    monkeypatch.setattr(ppg, "average_gradients", keep)
    for flag in ("--no-compile", "--compile"):
        gradients.append([])
        train(f"{SMALL} --arch dual --e-pi 2 --precision fp32 {flag} --run-dir {tmp_path / flag}")
    eager, compiled = gradients
    assert [step.keys() for step in compiled] == [step.keys() for step in eager]
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=1e-3, atol=1e-5)


def test_no_compiler(tmp_path):
    """Where --compile finds no compiler it says so, and the run goes to its end without."""
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    status, _, errors = finish(start(f"{SMALL} --run-dir {tmp_path / 'run'} --compile", env=environment))
    assert status == 0 and "compiler" in " ".join(errors)
    assert ppg.load(tmp_path / "run" / "checkpoint.pt")["global_step"] == PHASE


# ------------------------------------------------------------------------------------------------ evaluation and video


EVAL = f"{SMALL} --num-levels 20 --start-level 5 --eval-episodes 5"


def test_evaluation_sees_other_levels(tmp_path, monkeypatch, capsys):
    """Held-out levels are those after the training levels. Where all are trained on, they are called fresh."""
    seen, make_envs = [], ppg.make_envs

    def watched(*arguments, **options):
        envs = make_envs(*arguments, **options)
        seen.append(set())
        for _ in range(20):
            seen[-1] |= {info["level_seed"] for info in envs.procgen.get_info()}
            envs.step(np.full(5, -1))
        return envs

    monkeypatch.setattr(ppg, "make_envs", watched)
    agent = ppg.Agent((64, 64, 3), 15, "shared")
    ppg.evaluate(parse(EVAL), agent, torch.device("cpu"), 5, 0, tmp_path)
    training, held_out = seen
    assert training <= set(range(5, 25)) and len(training) > 5
    assert min(held_out) >= 25 and len(held_out) > 50
    assert re.findall(r"on (\S+) levels", capsys.readouterr().out) == ["training", "held-out"]
    ppg.evaluate(parse(SMALL), agent, torch.device("cpu"), 5, 0, tmp_path)
    assert re.findall(r"on (\S+) levels", capsys.readouterr().out) == ["fresh"]


def test_every_environment_plays_its_quota(tmp_path, monkeypatch, capsys):
    """Short episodes are not counted more often than long ones, and the number of episodes is printed."""
    envs = Quadrants(64, length=1, stagger=1)  # the length of its episodes names the environment
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: envs)
    agent = ppg.Agent((32, 32, 3), 4, "shared")
    logged = ppg.evaluate(parse(""), agent, torch.device("cpu"), 130, 0, tmp_path)
    returns = [[total for _, total, length in envs.ended if length == n][:3] for n in range(1, 65)]
    assert logged == {"eval/episodic_return": pytest.approx(np.mean(returns))}
    line = f"fresh levels: return {np.mean(returns):.2f} +- {np.std(returns) / 192**0.5:.2f}, "
    assert line in (output := capsys.readouterr().out) and "192 episodes" in output


def test_evaluating_an_agent(tmp_path, capsys):
    """--evaluate K --agent PATH plays another run's agent.pt, from another place and beside the run that goes on, and
    writes nothing; it prints what an evaluation within the run prints for that agent. A flag that contradicts those of
    its run ends in exit status 2 and one line that names it. No other process may run in that run's directory."""
    train(f"{EVAL} --run-dir {tmp_path / 'run'} --total-timesteps {PHASE}")
    read_until(start(f"--resume {tmp_path / 'run'} --total-timesteps 1e9"), "step")
    for flags in f"{EVAL} --run-dir {tmp_path / 'run'}", f"--resume {tmp_path / 'run'}":
        refused(flags, "another process", capsys)
    agent = shutil.copy(tmp_path / "run" / "agent.pt", tmp_path / "copy.pt")

    def present():  # but for what the run replaces at every moment
        return {path for path in tmp_path.rglob("*") if not re.match("checkpoint|.*partial", path.name)}

    before = present()
    status, output, errors = finish(start(f"--evaluate 5 --agent {agent}", cwd=tmp_path))
    assert (status, errors, len(output)) == (0, [], 2) and present() == before
    pattern = r"levels: return (\S+) \+- \S+, normalised \S+, 5 episodes"
    training, held_out = (float(re.search(pattern, line)[1]) for line in output)
    logged = {tag: points[PHASE] for tag, points in scalars(tmp_path / "run").items() if tag.startswith("eval/")}
    expected = logged["eval/episodic_return"], logged["eval/generalization_gap"]
    assert (held_out, training - held_out) == pytest.approx(expected, abs=0.011)
    for flags in "--num-levels 3", "--env-id maze", "--arch dual", "--precision bf16":
        refused(f"--evaluate 5 --agent {agent} {flags}", f"{flags}: the run has ", capsys)


def test_video(tmp_path, two_phases):
    """--capture-video writes a playable 512 x 512 film of an episode after each phase, all on the same level. Training
    is bit-identical without it and the evaluation, which is logged after each phase."""
    train(f"{SMALL} --eval-episodes 1 --capture-video --run-dir {tmp_path} --total-timesteps {2 * PHASE}")
    assert weights(tmp_path) == weights(two_phases)
    logged = scalars(tmp_path)
    assert list(logged["eval/episodic_return"]) == list(logged["eval/normalized_return"]) == [PHASE, 2 * PHASE]
    films = sorted((tmp_path / "videos").iterdir())
    assert {film.name for film in films} == {f"step-{PHASE}.mp4", f"step-{2 * PHASE}.mp4"}
    (first, *others), (begin, *_) = (list(islice(imageio.get_reader(film), 10)) for film in films)
    assert len(others) > 5 and first.shape == (512, 512, 3) and any((frame != first).any() for frame in others)
    assert np.abs(first.astype(int) - begin).mean() < 5  # another maze: 19


@pytest.mark.parametrize("mode, number", [("easy", 0.5 / 12.5), ("hard", 0.5 / 13.7), ("extreme", None)])
def test_normalised_return(mode, number):
    """The ranges of the Procgen paper are used, easy and hard; other modes have none."""
    envs = ppg.ProcgenVectorEnv("chaser", 1, 1, distribution_mode=mode)
    expected = {} if number is None else {"eval/normalized_return": pytest.approx(number)}
    assert ppg.normalized("eval", 1.0, envs) == expected


# --------------------------------------------------------------------------------------------------------------- README


def code_blocks(*languages):
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", README.read_text(), re.DOTALL | re.MULTILINE)
    return [code for language, code in blocks if language in languages]


def test_readme(tmp_path, two_phases, monkeypatch, capsys):
    """Every flag in the README exists, every command line of the script parses and resumes or evaluates what is there,
    .ci/run runs the test command, and the Python lines load runs/demo's agent.pt, play and print a return. The marks in
    the table of Algorithm 1 stand in the script, in the table's order."""
    shutil.copytree(two_phases, tmp_path / "runs" / "demo")
    (tmp_path / "results").symlink_to(SCRIPT.with_name("results"))
    monkeypatch.chdir(tmp_path)
    (tests,) = (block for block in code_blocks("bash") if "pytest" in block)
    assert tests.strip() in SCRIPT.with_name(".ci").joinpath("run").read_text()
    others = r"\b(pip|pytest|tensorboard|git|curl|uv|torchrun|venv)\b[^`\n;&|]*"
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(others, "", README.read_text())))
    assert named and named <= FLAGS
    blocks = "\n".join(code_blocks("sh", "bash", "console", ""))
    commands = re.findall(r"(?:python|torchrun)[^\n;&|#]* ppg_procgen\.py([^\n;&|#]*)", blocks.replace("\\\n", " "))
    assert [parse(flags) for flags in commands]
    (snippet,) = (block for block in code_blocks("python") if "load_agent" in block)
    exec(snippet, {})  # noqa: S102
    assert re.search(r"return \d", capsys.readouterr().out)
    section = README.read_text().partition("## Algorithm 1")[2].partition("##")[0]
    rows = re.findall(r"^\| .* \| `(.*)` \|$", section, re.MULTILINE)
    places = [SCRIPT.read_text().index(mark, SCRIPT.read_text().index("def train")) for mark in rows]
    assert len(rows) >= 8 and places == sorted(places)


@pytest.mark.parametrize(
    "recipe, flags, sign",
    [(0, "--env-id breakout", "breakout easy"), (1, "", "110,417 parameters"), (2, "", "shift_loss")],
)
def test_recipes(tmp_path, recipe, flags, sign):
    """Each of the README's diffs has at most 30 lines, applies to the script, and the result trains."""
    diff = code_blocks("diff")[recipe]
    assert diff.count("\n") <= 30
    shutil.copy(SCRIPT, tmp_path)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, check=True, cwd=tmp_path)
    status, output, errors = finish(start(f"{SMALL} {flags}", script=SCRIPT.name, cwd=tmp_path))
    assert (status, errors) == (0, []) and any(sign in line for line in output)


# ----------------------------------------------------------------------------------------- several processes (torchrun)

# Three phases of two rollouts, each of 128 steps.
RANKS_RUN = f"{SMALL} --env-id bossfight --num-envs 8 --num-steps 16 --total-timesteps 768"
# One phase each. In the first, the minibatches of one process come in two chunks.
VARIANTS = {
    "dual": "--arch dual --e-pi 1 --e-v 2 --num-steps 40 --total-timesteps 640",
    "shared": "--arch shared --e-aux 2 --num-steps 24 --total-timesteps 384",
    "float32": "--n-pi 1 --e-aux 0 --num-minibatches 1 --num-steps 24 --total-timesteps 192",
}


def rank_main(folder):
    """What each process of `ranks` does: a run of the script, which starts the process group, then the variants, whose
    data do not depend on the number of processes."""
    sys.argv = [str(SCRIPT), *f"{RANKS_RUN} --num-steps 1 --total-timesteps 16 --run-dir {folder}/script".split()]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    results, share = {}, 8 // ppg.WORLD_SIZE
    ppg.free_memory = lambda: 10**12  # these take little; a real run of 4 processes wants 6 GB

    def numbered(args, num_envs, seed):
        return Quadrants(num_envs, stagger=1, scale=1, size=8, first=ppg.RANK * share)

    def act_by_image(agent, obs, bf16):
        logits, _, values = agent(obs, bf16)
        actions = obs[:, 0, 0, 0].long() % 4
        return actions, logits.detach().log_softmax(-1)[range(len(obs)), actions], values.detach()

    def even_then_odd(rows):
        """Halves equal on 1, 2 or 4 ranks: a rollout's even and odd steps, or (auxiliary phase) environments."""
        rollouts = 2 if rows == 2 * share else 1
        return torch.arange(rows).view(rollouts, -1, 2).mT.flatten()

    ppg.make_envs, ppg.act, torch.randperm = numbered, act_by_image, even_then_odd
    for name, flags in VARIANTS.items():
        torch.set_default_dtype(torch.float32 if name == "float32" else torch.float64)
        agent = train(f"{RANKS_RUN} {flags} --precision fp32 --run-dir {folder}/{name}")
        named = dict(agent.named_parameters())
        results[name] = {"parameters": {key: p.detach() for key, p in named.items()}}
        results[name]["gradients"] = {key: p.grad for key, p in named.items() if p.grad is not None}
    if ppg.RANK == 1:
        agent.value_head.bias.data = agent.value_head.bias.data.nextafter(torch.ones(1))
    with contextlib.suppress(ppg.Stopped):
        ppg.check_equal(agent)
        results["equal"] = True
    torch.save(results, Path(folder, f"{ppg.RANK}.pt"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the ranks of 1 (without torchrun), 2 and 4 processes found: {processes: [result]}, and the folder."""
    folder = tmp_path_factory.mktemp("ranks")
    for process in [start(f"{folder}/{n}", __file__, n) for n in (1, 2, 4)]:
        assert finish(process)[0] == 0
    return {n: [torch.load(folder / f"{n}/{rank}.pt") for rank in range(n)] for n in (1, 2, 4)}, folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """An uninterrupted run of two processes: its directory and its lines of stdout."""
    run_dir = tmp_path_factory.mktemp("two_processes")
    status, output, errors = finish(start(f"{RANKS_RUN} --run-dir {run_dir}", processes=2), OF_SCRIPT)
    assert (status, errors) == (0, [])
    return run_dir, output


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_do_not_change_the_mathematics(ranks, processes):
    """A phase in several processes gives the parameters, on every rank, and the logged values of one process whose
    minibatches are the unions of the ranks', though the environments of each rank have rewards of another scale. In
    fp32 the averaged gradient of a step is that of one process to 1e-5."""
    results, folder = ranks
    for result in results[processes]:
        for name in ("dual", "shared"):
            expected = results[1][0][name]["parameters"]
            assert expected["value_head.bias"].dtype == torch.float64
            torch.testing.assert_close(result[name]["parameters"], expected, rtol=0, atol=1e-9)
        expected = results[1][0]["float32"]["gradients"]
        assert result["float32"]["gradients"].keys() == expected.keys()
        for parameter, gradient in result["float32"]["gradients"].items():
            assert (gradient - expected[parameter]).norm() <= 1e-5 * expected[parameter].norm() > 0, parameter
    for name in ("dual", "shared"):
        one, several = (untimed(folder / str(n) / name) for n in (1, processes))
        assert one.keys() == several.keys() and sum(one["charts/episodes"].values()) > 10
        for tag in one:
            assert several[tag] == pytest.approx(one[tag], rel=1e-5, abs=1e-9), tag


def test_parameters_that_differ_end_the_run(ranks):
    """One parameter of one rank that differs in its last bit is noticed by every rank."""
    assert [["equal" in result for result in ranks[0][n]] for n in (1, 2, 4)] == [[True], [False] * 2, [False] * 4]


def test_ranks_have_their_own_streams(ranks):
    """Each rank has levels and actions of its own; rank 0 has the seed itself, and no two pairs among 100,000
    consecutive seeds and 64 ranks share a stream. Procgen takes every such seed."""
    for n in (2, 4):
        at_start = torch.load(ranks[1] / f"{n}/script/checkpoint.previous.pt", weights_only=True)["ranks"]
        assert len(torch.cat([rank["next_obs"] for rank in at_start]).flatten(1).unique(dim=0)) == 8
        assert len({rank["cpu_random"].numpy().tobytes() for rank in at_start}) == n
    for lowest in (0, 2**30 - 99_999):
        seeds = np.arange(lowest, lowest + 100_000)
        streams = ppg.stream_seed(seeds, np.arange(64)[:, None])
        assert (streams[0] == seeds).all() and streams.min() >= 0 and streams.max() < 2**31
        assert (np.diff(np.sort(streams, axis=None)) > 0).all()
    ppg.ProcgenVectorEnv("chaser", 1, 2**31 - 1, distribution_mode="easy").close()


def test_output_of_two_processes(two_processes, capsys):
    """Rank 0 alone prints and writes: each line and file is there once. Steps and episodes are those of all ranks. Such
    a run does not resume in one process: exit status 2 and one line that says so. Evaluations share their episodes."""
    run_dir, lines = two_processes
    logged, steps, output = untimed(run_dir), list(range(128, 769, 128)), "\n".join(lines)
    assert len(lines) == 1 + 6 + 3 + 1 and lines[0].startswith("bossfight") and lines[-1].startswith("done in"), output
    assert re.findall(r"^step ([\d,]+)/768", output, re.MULTILINE) == [f"{step:,}" for step in steps]
    assert re.findall(r"^  auxiliary phase (\d)", output, re.MULTILINE) == ["1", "2", "3"]
    names = sorted(file.name for file in run_dir.iterdir() if not file.name.startswith("events"))
    assert names == [".lock", "agent.pt", "checkpoint.previous.pt", "checkpoint.pt"]
    assert len(list(run_dir.glob("events*"))) == 1
    assert list(logged["losses/policy_loss"]) == steps and list(logged["losses/aux/kl_loss"]) == steps[1::2]
    under_way = [rank["episodes"]["under_way"][:, 1] for rank in ppg.load_checkpoint(run_dir)[1]["ranks"]]
    assert len(under_way) == 2 and under_way[1].sum() < 4 * 96  # some have ended on rank 1
    lengths = logged["charts/episodic_length"]
    complete = sum(logged["charts/episodes"][step] * length for step, length in lengths.items())
    assert complete + torch.cat(under_way).sum() == pytest.approx(768)
    refused(f"--resume {run_dir}", "a run of 2 processes, and this is 1", capsys)
    status, lines, errors = finish(start(f"--evaluate 5 --agent {run_dir}/agent.pt", processes=2), OF_SCRIPT)
    assert (status, errors, len(lines)) == (0, [], 1) and "8 episodes" in lines[0]  # 2 of 2 environments of 2 ranks


@pytest.mark.parametrize("stopped_by", ["rank 1 is killed", "Ctrl-C"])
def test_stopped_run_of_two_processes(tmp_path, two_processes, stopped_by):
    """Where a rank is killed, or on Ctrl-C, all ranks end within a minute, with one line that says what is saved. After
    the kill, the command that it gives continues the run, to the same end, bit for bit, as if nothing had happened."""
    launched = start(f"{RANKS_RUN} --run-dir {tmp_path}/run", processes=2)
    read_until(launched, "step 384")
    if stopped_by == "Ctrl-C":
        os.killpg(launched.pid, signal.SIGINT)
    else:
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()  # rank by rank
        pids = [int(pid) for pid in children if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]
        begin = time.monotonic()
        os.kill(launched.pid, signal.SIGSTOP)  # or it may end rank 0 before that finds out by itself
        os.kill(pids[1], signal.SIGKILL)
        while " Z " not in Path(f"/proc/{pids[0]}/stat").read_text():
            assert time.monotonic() < begin + 60
            time.sleep(0.1)
        os.kill(launched.pid, signal.SIGCONT)
    status, _, errors = finish(launched, OF_SCRIPT, within=60)
    assert status != 0 and len(errors) == 1
    assert f": {'SIGINT' if stopped_by == 'Ctrl-C' else 'another process has ended'}: saved " in errors[0]
    step = ppg.load_checkpoint(tmp_path / "run")[1]["global_step"]
    assert step in (256, 512) and f" saved up to step {step:,}; " in errors[0]
    if stopped_by == "Ctrl-C":
        return
    subprocess.run(errors[0].partition("continue with: ")[2], shell=True, check=True)
    assert content(tmp_path / "run") == content(two_processes[0])


SLOW_RANK_0 = """
import hashlib, os, time
if os.environ.get("RANK") == "0":
    time.sleep(4)
    sha256 = hashlib.sha256
    hashlib.sha256 = lambda *arguments, **options: time.sleep(1) or sha256(*arguments, **options)
"""


@pytest.mark.parametrize(
    "flags, lines",
    [
        ("--learning-rate 1e11 --n-pi 7", ["warning: no auxiliary phase", "losses/.* is not finite in policy phase 1"]),
        ("--num-aux-minibatches 8", ["error: --num-envs 8 is not a multiple of --num-aux-minibatches 8 x 2 processes"]),
    ],
)
def test_errors_of_two_processes(tmp_path, flags, lines):
    """A loss that is not finite ends all ranks; so do environments that the ranks' minibatches cannot share equally.
    Each error and warning is one line, also where rank 0 starts late and reads its checkpoint slowly."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_RANK_0)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    launched = start(f"{RANKS_RUN} {flags} --run-dir {tmp_path}/run", processes=2, env=environment)
    status, _, errors = finish(launched, OF_SCRIPT)
    assert status != 0 and len(errors) == len(lines), errors
    assert all(re.search(expected, line) for expected, line in zip(lines, errors)), errors


if __name__ == "__main__":
    rank_main(sys.argv[1])
