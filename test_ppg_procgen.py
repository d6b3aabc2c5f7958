"""Tests of ppg_procgen.py: each docstring is the claim. Procgen, TensorBoard files, processes and signals are real."""

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import gym
import imageio
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from procgen import ProcgenGym3Env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Categorical, kl_divergence
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ppg_procgen as ppg

SCRIPT, PROCESSES = Path(ppg.__file__), []
README = SCRIPT.with_name("README.md").read_text()
OF_SCRIPT = rf"(?:{SCRIPT.name}: |stopped at |.*File \"{SCRIPT}\").*"  # its own lines among torchrun's
# One phase: two rollouts of 32 steps and an auxiliary phase. Chaser rewards a random policy within a few steps.
SMALL = "--env-id chaser --arch shared --num-envs 4 --num-steps 8 --num-minibatches 2 --n-pi 2 --num-aux-minibatches 2"
SMALL += " --e-aux 1 --total-timesteps 64 --device cpu"
EVAL, CPU = f"{SMALL} --num-levels 20 --start-level 5 --eval-episodes 5", torch.device("cpu")
ROLLOUT, PHASE, UNTIMED = 32, 64, r"(?!charts/SPS|time/)"
DETACHED = [f"shared --detach-value {phases}" for phases in ("policy-phase", "always", "never")]


def parse(flags):
    return ppg.parse_args(shlex.split(flags))


def train(flags):
    """A run, or more of one, in this process -> its agent."""
    args = parse(flags) if isinstance(flags, str) else flags
    with ppg.run_directory(args) as run_dir:
        # TensorBoard reads the event files of a directory in the order of the seconds in their names.
        while list(run_dir.glob(f"events.*.{int(time.time())}.*")):
            time.sleep(0.05)
        return ppg.train(args, run_dir)


def refused(flags, pattern, capsys):
    """A run in this process ends with exit status 2 and one line on stderr, in which this is found."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(flags)
    errors = capsys.readouterr().err
    assert (stopped.value.code, errors.count("\n")) == (2, 1) and re.search(pattern, errors), errors


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


def scalars(run_dir, tags=""):
    """TensorBoard's scalars of a run, of tags that begin so: {tag: {step: value}}."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in log.Scalars(tag)} for tag in log.Tags()["scalars"] if re.match(tags, tag)}


def flat(value, path="checkpoint"):
    """Nested containers -> {path: value as text}, tensors as their type, shape and hash."""
    if isinstance(value, torch.Tensor):
        return {path: (value.dtype, tuple(value.shape), hash(value.numpy().tobytes()))}
    if not isinstance(value, (dict, list, tuple)):
        return {path: repr(value)}  # as text, nan equals nan
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for key, part in items for name, leaf in flat(part, f"{path}.{key}").items()}


def checkpoint(run_dir):
    return ppg.load(Path(run_dir, "checkpoint.pt"))


def content(run_dir):
    """All that two equal runs have in common, bit by bit: the checkpoint, the weights and the scalars."""
    data = checkpoint(run_dir)
    del data["args"]["total_timesteps"], data["args"]["checkpoint_every"]
    return flat(data) | flat(ppg.load_agent(run_dir)[0].state_dict(), "agent") | flat(scalars(run_dir, UNTIMED), "log")


def files(run_dir):
    return {file.name: file.read_bytes() for file in Path(run_dir).glob("*.pt")}


@pytest.fixture
def record(monkeypatch):
    """Every epoch of a run: its data with row numbers, storage, minibatches, steps (optimizer, gradients, weights)."""
    epochs, real = [], ppg.minibatches

    def recording(data, *rest):
        epochs.append({"data": {name: x.clone() for name, x in data.items()}, "batches": [], "steps": []})
        epochs[-1]["storage"] = data["obs"].untyped_storage()
        rows = torch.arange(len(data["obs"])).view(-1, *[1] * (data["targets"].dim() - 1)).expand_as(data["targets"])
        for batch in real({**data, "row": rows}, *rest):
            epochs[-1]["batches"].append(batch)
            yield batch

    def before_step(optimizer, *_):
        parameters = optimizer.param_groups[0]["params"]
        gradients = [p.grad if p.grad is None else p.grad.clone() for p in parameters]
        epochs[-1]["steps"].append((optimizer, gradients, [p.detach().clone() for p in parameters]))

    monkeypatch.setattr(ppg, "minibatches", recording)
    hook = register_optimizer_step_pre_hook(before_step)
    yield epochs
    hook.remove()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directories of uninterrupted runs of two and of three phases: {phases: path}."""
    paths = {phases: tmp_path_factory.mktemp("run") for phases in (2, 3)}
    for phases, path in paths.items():
        train(f"{SMALL} --run-dir {path} --total-timesteps {phases * PHASE}")
    return paths


@pytest.fixture
def run_dir(runs, tmp_path):
    return shutil.copytree(runs[2], tmp_path / "run")


class Quadrants(gym.vector.VectorEnv):
    """The bright quadrant names the right action of 4, each 2nd step pays for the one before. Episodes of environment n
    have length + n * stagger steps and images of their own; in every second their end is called truncated."""

    def __init__(self, num_envs, length=4, stagger=0, scale=0, size=32, first=0):
        super().__init__(num_envs, gym.spaces.Box(0, 255, (size, size, 3), np.uint8), gym.spaces.Discrete(4))
        self.numbers, self.metadata = first + np.arange(num_envs), {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.lengths, self.pay = length + stagger * self.numbers, 1.0 + scale * self.numbers
        self.generators = [np.random.default_rng(n) for n in self.numbers]
        self.masks = 128 * np.eye(4, dtype=np.uint8).reshape(4, 2, 2, 1).repeat(size // 2, 1).repeat(size // 2, 2)
        self.ended, self.clock = [], 0  # of every episode: the step that ended it, its return, its length

    def draw(self):
        self.target = np.array([generator.integers(4) for generator in self.generators])
        noise = [g.integers(0, 128, (*self.masks.shape[1:3], 3), np.uint8) for g in self.generators]
        return np.stack(noise) + self.masks[self.target]

    def reset(self, seed=None):
        self.steps, self.totals, self.right = np.zeros((3, self.num_envs))
        return self.draw(), {}

    def step(self, actions):
        self.steps, self.clock = self.steps + 1, self.clock + 1
        rewards = self.pay * self.right * (self.steps % 2 == 0)
        self.right, self.totals = actions == self.target, self.totals + rewards
        ends, called_truncated = self.steps == self.lengths, self.numbers % 2 == 1
        self.ended += [(self.clock, self.totals[n], self.steps[n]) for n in np.flatnonzero(ends)]
        self.steps[ends] = self.totals[ends] = 0
        return self.draw(), rewards, ends & ~called_truncated, ends & called_truncated, {}


# ----------------------------------------------------------------------------------------------------------------- math
def test_gae_and_explained_variance():
    """A_t is the sum of (gamma lambda)^l delta_{t+l} up to the episode's end, and V^targ is A + V. Values explain all
    of targets that they equal, up to a constant, none as a constant, and for constant targets nothing is said: nan."""
    N, T, gamma, gae_lambda = 5, 12, 0.9, 0.8
    rewards, values, dones = torch.randn(N, T), torch.randn(N, T + 1), (torch.rand(N, T) < 0.25).float()
    expected, deltas = torch.zeros(N, T), rewards + gamma * (1 - dones) * values[:, 1:] - values[:, :-1]
    for n, t, k in np.ndindex(N, T, T):
        if k >= t:
            expected[n, t] += (gamma * gae_lambda) ** (k - t) * (1 - dones[n, t:k]).prod() * deltas[n, k]
    advantages, targets = ppg.compute_gae(rewards, values, dones, gamma, gae_lambda)
    torch.testing.assert_close((advantages, targets), (expected, expected + values[:, :-1]))
    for values, explained in (targets + 5, 1), (0 * targets, 0), (targets / 2, 0.75), (-targets, -3):
        assert ppg.explained_variance(values, targets) == pytest.approx(explained, abs=1e-5)
    assert np.isnan(ppg.explained_variance(targets, 0 * targets))


@pytest.mark.parametrize("arch", ["dual", *DETACHED])
@pytest.mark.parametrize("clip_coef, kl_coef", [(0.1, 0), (0, 0), (0.1, 0.4)])
def test_losses_are_those_of_the_paper(arch, clip_coef, kl_coef):
    """The policy phase minimises -L^clip + kl_coef * 1/2 log^2 - beta_S * entropy + L^value, the auxiliary phase L^aux
    + beta_clone * KL[pi_old, pi] + L^value. The parts are logged, and every parameter has the gradient of these losses;
    L^value trains the value encoder, or a shared one in the phases that --detach-value leaves."""
    args = parse(f"--arch {arch} --ent-coef 0.3 --beta-clone 0.7 --clip-coef {clip_coef} --kl-coef {kl_coef}")
    batch = {"obs": torch.randint(0, 256, (12, 8, 8, 3), dtype=torch.uint8), "actions": torch.randint(0, 5, (12,))}
    batch |= {"advantages": torch.randn(12), "targets": torch.randn(12), "old_logits": torch.randn(12, 5)}
    batch["logprobs"] = Categorical(logits=batch["old_logits"]).log_prob(batch["actions"])
    agent = ppg.Agent((8, 8, 3), 5, args.arch)
    features = agent.policy_encoder(batch["obs"])
    value_features = agent.value_encoder(batch["obs"]) if arch == "dual" else features
    outputs = agent.aux_value_head(features), agent.value_head(value_features), agent.value_head(features.detach())
    old, new = (Categorical(logits=x) for x in (batch["old_logits"], agent.policy_head(features)))
    log_ratio = new.log_prob(batch["actions"]) - batch["logprobs"]
    ratio, entropy, kl = log_ratio.exp(), new.entropy().mean(), kl_divergence(old, new).mean()
    surrogate, clipped = ratio * batch["advantages"], ratio.clamp(1 - clip_coef, 1 + clip_coef) * batch["advantages"]
    policy_loss = -(torch.min(surrogate, clipped) if clip_coef else surrogate).mean()
    policy_loss, approx_kl = policy_loss + 0.5 * kl_coef * (log_ratio**2).mean(), (ratio - 1 - log_ratio).mean()
    aux_value_loss, value_loss, detached = (0.5 * (x.squeeze(-1) - batch["targets"]).square().mean() for x in outputs)
    policy_parts = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "approx_kl": approx_kl}
    policy_parts |= {"clipfrac": ((ratio - 1).abs() > clip_coef).float().mean()} if clip_coef else {}
    aux_parts = {"aux/kl_loss": kl, "aux/aux_value_loss": aux_value_loss, "aux/real_value_loss": value_loss}
    policy_total = policy_loss - 0.3 * entropy + (detached if arch in DETACHED[:2] else value_loss)
    aux_total = aux_value_loss + 0.7 * kl + (detached if arch == DETACHED[1] else value_loss)
    policy, auxiliary = ppg.policy_phase_loss(agent, batch, args), ppg.auxiliary_phase_loss(agent, batch, args)
    for (loss, metrics), expected, parts in (policy, policy_total, policy_parts), (auxiliary, aux_total, aux_parts):
        torch.testing.assert_close(metrics, {f"losses/{name}": value for name, value in parts.items()})
        torch.testing.assert_close(loss, expected)
        parameters = [*agent.parameters()]
        gradients = [torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (loss, expected)]
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


@pytest.mark.parametrize("arch, parameters", [("shared", 626_513), ("dual", 1_248_657)])
def test_size_and_initialisation(arch, parameters):
    """The networks have the paper's size, rows and filters begin with their norm, biases with 0, or it is an error."""
    agent = ppg.Agent((64, 64, 3), 15, arch)
    assert sum(p.numel() for p in agent.parameters()) == parameters
    for name, layer in agent.named_modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            in_block = (1 / 6**0.5) ** 0.5 if ".conv" in name else 1.0
            norm = 0.1 if "head" in name else 1.4 if "dense" in name else in_block
            torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), torch.full((len(layer.weight),), norm))
            assert not layer.bias.any()
    with pytest.raises(RuntimeError, match="view"):
        ppg.init_layer(torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), 1.0)


@pytest.mark.parametrize("game", ppg.GAMES)
def test_every_game_in_every_mode(game):
    """Each of the 16 games gives in all its modes, as gym 0.26 has it, what gym3 gives for the seed, whatever the
    threads. A saved state goes on exactly, and a reset amid episodes begins new ones."""
    for mode in ppg.GAMES[game]:
        args, generator = parse(f"{SMALL} --env-id {game} --distribution-mode {mode}"), np.random.default_rng(0)
        one, other = (ppg.make_envs(args, 4, seed) for seed in (1, 2))
        plain = ProcgenGym3Env(4, game, distribution_mode=mode, rand_seed=1, num_threads=2)
        spaces = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Discrete(15)
        assert (one.single_observation_space, one.single_action_space) == spaces and len(ppg.GAMES) == 16
        begin = one.reset()[0].copy()
        np.testing.assert_array_equal(begin, plain.observe()[1]["rgb"])
        assert (other.reset()[0] != begin).any() or mode == "exploration"
        for t, actions in enumerate(generator.integers(0, 15, (60, 4))):
            plain.act(actions)
            expected_rewards, expected_obs, first = plain.observe()
            *step, info = one.step(actions)
            for ours, expected in zip(step, (expected_obs["rgb"], expected_rewards, first, first & False), strict=True):
                np.testing.assert_array_equal(ours, expected)
            if t == 30:
                other.load_state_dict(one.state_dict())
            if t > 30:
                np.testing.assert_array_equal(other.step(actions)[0], step[0])
        assert np.ptp(begin) > 0 and (begin != step[0]).any() and info == {}
        assert (one.reset(seed=5)[0] != step[0]).any() and one.procgen.observe()[2].all()
        assert ("x/normalized_return" in ppg.return_metrics("x", np.ones(1), one)) == (mode in ("easy", "hard"))
        one.close(), other.close(), plain.close()


# ------------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("arch, cpu, precision", [("shared", {}, "fp32"), ("dual", {"amx_bf16": True}, "bf16")])
def test_first_kl_is_zero(tmp_path, monkeypatch, capsys, arch, cpu, precision):
    """Before the first auxiliary step KL is exactly 0, in two chunks and any precision: bf16 where the CPU has it, as
    the first line says. For pi_old the policy encoder alone runs, once over every chunk of the buffer."""
    passes = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    for name in ("policy_phase_loss", "auxiliary_phase_loss"):
        monkeypatch.setattr(ppg, name, Mock(wraps=getattr(ppg, name)))
    hook = register_module_forward_hook(lambda module, *_: passes.append(module))
    flags = f"--arch {arch} --num-steps 128 --n-pi 1 --total-timesteps 512"
    agent = train(f"{SMALL} --run-dir {tmp_path} {flags} --num-aux-minibatches 1")  # 1 auxiliary epoch of 1 minibatch
    hook.remove()
    assert scalars(tmp_path)["losses/aux/kl_loss"] == {512: 0.0}
    machine = f"cpu ({torch.get_num_threads()} threads), policy phase fp32, auxiliary phase {precision}"
    assert machine in capsys.readouterr().out.splitlines()[0]
    assert not ppg.policy_phase_loss.call_args.args[3]
    assert ppg.auxiliary_phase_loss.call_args.args[3] == (precision == "bf16")
    if arch == "dual":
        assert passes.count(agent.policy_encoder) - passes.count(agent.value_encoder) == 512 / 128


def test_minibatches(tmp_path, record):
    """Policy epochs take each transition once, auxiliary epochs each segment of the phase, in orders of their own, from
    one buffer. A step takes the gradient of its own minibatch alone, also in chunks of which the last is shorter, by
    its phase's Adam. Advantages are normalised over the rollout, and means are logged."""
    flags = "--precision fp32 --num-steps 132 --total-timesteps 1056 --e-v 2 --e-aux 2"
    agent = train(f"{SMALL} --run-dir {tmp_path} {flags} --aux-learning-rate 3e-4")
    args, logged, orders = ppg.load_agent(tmp_path)[1], scalars(tmp_path), []
    for epoch in record:
        data, batches = epoch["data"], epoch["batches"]
        rows = [row.flatten()[0].item() for batch in batches for row in batch["row"]]
        assert {len(x) for batch in batches for x in batch.values()} == {len(rows) // len(batches)}
        assert all(torch.equal(torch.cat([batch[name] for batch in batches]), data[name][rows]) for name in data)
        orders.append(rows)
    assert [sorted(rows) for rows in orders] == [list(range(528))] * 4 + [list(range(8))] * 2
    assert all(a != b for a, b in pairwise(orders)) and [len(epoch["batches"]) for epoch in record] == [2] * 4 + [4] * 2
    for name in ("obs", "targets"):
        both = torch.cat([record[0]["data"][name], record[2]["data"][name]])
        assert all(torch.equal(epoch["data"][name].flatten(0, 1), both) for epoch in record[4:])
    assert len({epoch["storage"].data_ptr() for epoch in record}) == 1
    advantages = record[0]["data"]["advantages"]
    assert (advantages.mean().item(), advantages.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-5)
    optimizers = [{step[0] for epoch in part for step in epoch["steps"]} for part in (record[:4], record[4:])]
    assert [[optimizer.param_groups[0]["lr"] for optimizer in part] for part in optimizers] == [[5e-4], [3e-4]]
    for epoch, loss_of in (record[2], ppg.policy_phase_loss), (record[5], ppg.auxiliary_phase_loss):
        means = {}
        for batch, (_, gradients, values) in zip(epoch["batches"], epoch["steps"], strict=True):
            for parameter, value in zip(agent.parameters(), values):
                parameter.data, parameter.grad = value, None
            if "old_logits" in batch:
                batch = {name: x.flatten(0, 1) for name, x in batch.items()}
            loss, metrics = loss_of(agent, batch, args)
            loss.backward()
            torch.testing.assert_close([p.grad for p in agent.parameters()], gradients, rtol=1e-3, atol=1e-5)
            means = {tag: means.get(tag, 0) + x.item() / len(epoch["steps"]) for tag, x in metrics.items()}
        for tag in means.keys() - {"losses/value_loss"}:  # which has two epochs
            assert logged[tag][1056] == pytest.approx(means[tag], rel=1e-3, abs=1e-6), tag


@pytest.mark.parametrize("arch, e_pi, e_v", [(arch, *e) for arch in ["dual", *DETACHED] for e in ((1, 3), (3, 1))])
def test_policy_and_value_epochs_apart(tmp_path, record, arch, e_pi, e_v):
    """Parameters take steps in the epochs of their own losses only, and stay as they are, bit for bit, in the others;
    the auxiliary value head in all of the policy phase. With --e-aux 0 the buffer holds one rollout."""
    flags = f"--arch {arch} --e-pi {e_pi} --e-v {e_v} --e-aux 0 --num-aux-minibatches 16"
    agent, epochs = train(f"{SMALL} --run-dir {tmp_path} {flags}"), {"policy": e_pi, "value": e_v, "aux": 0}
    assert [epoch["storage"].nbytes() for epoch in record] == [ROLLOUT * 64 * 64 * 3] * 6
    history = [values for epoch in record for *_, values in epoch["steps"]][:7]
    for i, (name, _) in enumerate(agent.named_parameters()):
        moves = [not torch.equal(a[i], b[i]) for a, b in pairwise(history)]
        both = "never" in arch and name.startswith("policy_encoder")
        steps = 2 * (max(e_pi, e_v) if both else epochs[name.split("_")[0]])
        assert moves == [True] * steps + [False] * (6 - steps), name


def test_max_grad_norm(tmp_path, monkeypatch, record):
    """--max-grad-norm limits the joint norm of every step's gradients, in both phases; 0 leaves every bit of them."""
    train(f"{SMALL} --run-dir {tmp_path / 'limited'} --max-grad-norm 0.02")
    for epoch in record:
        norms = [torch.cat([g.flatten() for g in gs if g is not None]).norm() for _, gs, _ in epoch["steps"]]
        assert max(norms) == pytest.approx(0.02, rel=1e-3)
    train(f"{SMALL} --run-dir {tmp_path / 'zero'} --max-grad-norm 0")
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    train(f"{SMALL} --run-dir {tmp_path / 'none'}")
    gradients = [flat([gradients for _, gradients, _ in epoch["steps"]]) for epoch in record]
    assert len(gradients) == 9 and gradients[3:6] == gradients[6:]


@pytest.mark.parametrize("variant", ["shared", "dual", "shared --detach-value never --e-pi 3 --e-v 3 --e-aux 0"])
def test_learning(tmp_path, monkeypatch, variant):
    """PPG with one or two networks and PPO come from chance to 90 % of the best return elsewhere; their agents load."""
    envs = Quadrants(16)
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: envs)
    flags = "--num-envs 16 --num-steps 16 --num-minibatches 4 --num-aux-minibatches 4 --n-pi 4 --e-aux 1 --gamma 0.9"
    flags += " --learning-rate 1e-3 --aux-learning-rate 1e-3 --total-timesteps 3584 --device cpu"
    train(f"{flags} --run-dir {tmp_path} --arch {variant}")
    returns = [total for _, total, _ in envs.ended]
    assert np.mean(returns[:50]) < 0.5 * 2 and np.mean(returns[-100:]) >= 0.9 * 2
    actions, *_ = ppg.act(ppg.load_agent(tmp_path)[0], torch.from_numpy(envs.draw()))
    assert (actions.numpy() == envs.target).mean() > 0.7


def test_without_procgen(tmp_path):
    """With an environment of its own, it does without procgen, gym, gym3, glibc, fcntl, /proc and sched_getaffinity."""
    script, environment = tmp_path / "elsewhere.py", {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    script.write_text("""
import ctypes, os, pathlib, sys, types
import numpy as np
import torch  # torch itself needs some of what is taken away now
def missing(*_, **__): raise OSError("not on this system")
sys.modules |= dict.fromkeys(["procgen", "gym", "gym3", "fcntl"])  # to import these fails
ctypes.CDLL = missing
del os.sched_getaffinity
class Envs:
    num_envs, single_observation_space = 4, types.SimpleNamespace(shape=(16, 16, 3), dtype=np.uint8)
    single_action_space = type("Discrete", (), dict(n=4))()
    reset = lambda self, seed=None: (np.zeros((4, 16, 16, 3), np.uint8), {})
    step = lambda self, actions: (self.reset()[0], actions * 0.5, actions == 0, actions == 1, {})
    close = lambda self: None
import ppg_procgen as ppg
pathlib.Path.read_text = missing  # the script reads nothing but /proc so
ppg.make_envs, args = lambda *_, **__: Envs(), ppg.parse_args()
with ppg.run_directory(args) as run_dir: ppg.train(args, run_dir)
""")
    for flags in f"{SMALL} --eval-episodes 4 --run-dir {tmp_path}", f"--resume {tmp_path} --total-timesteps 128":
        status, output, _ = finish(start(flags, script, env=environment))
        assert status == 0 and output[-2].startswith("  evaluation on fresh levels: return ")
    assert checkpoint(tmp_path)["global_step"] == 2 * PHASE


# ---------------------------------------------------------------------------------------------- flags, console, output
FLAGS = {f"--{name.replace('_', '-')}" for name in vars(parse(""))}
EFFECTS = """--env-id starpilot --distribution-mode hard --num-levels 1 --start-level 7 --seed 2 --num-envs 2
--num-steps 4 --total-timesteps 96 --arch dual --detach-value never --learning-rate 1e-3 --gamma 0.5 --gae-lambda 0.5
--kl-coef 1 --reward-norm-gamma 0.5 --num-minibatches 4 --clip-coef 1e-4 --ent-coef 0.1 --max-grad-norm 0.02 --n-pi 1
--e-pi 2 --e-v 2 --e-aux 2 --beta-clone 5 --num-aux-minibatches 4 --aux-learning-rate 1e-3 --precision bf16
--checkpoint-every 0"""
EFFECTS = dict(zip(*[iter(EFFECTS.split())] * 2))  # flag: another value than in SMALL


def observe(run_dir, flags=""):
    """A small run -> its weights, the steps that it logged, its files."""
    agent = train(f"{SMALL} --run-dir {run_dir} {flags}")
    logged = {tag: list(points) for tag, points in scalars(run_dir).items()}
    return flat(agent.state_dict()) | logged | dict.fromkeys(files(run_dir))


def test_every_flag_has_an_effect(tmp_path):
    """Every flag alone changes the weights in the end, the steps that are logged or the files that are written;
    --start-level does so with --num-levels. The flags that are not in the list have tests of their own."""
    others = "--exp-name --run-dir --resume --compile --eval-episodes --capture-video --evaluate --agent --device"
    assert FLAGS - EFFECTS.keys() == {*others.split(), "--init-agent"}
    without = {flags: observe(tmp_path / f"without{flags[:1]}", flags) for flags in ("", "--num-levels 1")}
    for flag, value in EFFECTS.items():
        context = "--num-levels 1" if flag == "--start-level" else ""
        assert observe(tmp_path / flag, f"{context} {flag} {value}") != without[context], flag


def test_seed(tmp_path, monkeypatch):
    """By --seed, runs are reproducible in gym's own vector environments, which are seeded at their reset, and with
    numpy's random numbers; the seed is torch's too, so that equal environments end with other parameters."""

    class Image(gym.ObservationWrapper):
        observation_space = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)

        def observation(self, state):
            return np.resize(state.view(np.uint8), (16, 16, 3)) + np.uint8(np.random.randint(9))

    makers = [lambda: Image(gym.make("CartPole-v1"))] * 4
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: gym.vector.SyncVectorEnv(makers))
    assert observe(tmp_path / "a", "--seed 3") == observe(tmp_path / "b", "--seed 3")
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: Quadrants(4))
    assert observe(tmp_path / "c", "--seed 3") != observe(tmp_path / "d", "--seed 4")


def test_agents(tmp_path, monkeypatch, runs, capsys):
    """A run leaves its flags as they were; agent.pt holds agent and flags, no file a path of this machine. --init-agent
    begins a new run of any game with an agent's parameters, but not another network's. A short run brings a warning."""
    monkeypatch.chdir(tmp_path)
    args = parse(f"{SMALL} --env-id bigfish --exp-name mine --init-agent {runs[2]} --total-timesteps {ROLLOUT}")
    assert re.search("warning: .* --total-timesteps 64 or --n-pi 1\n", capsys.readouterr().out)
    before, agent = dict(vars(args)), train(args)
    (run_dir,) = tmp_path.glob(f"runs/bigfish__mine__1__*-{os.getpid()}")  # two runs in one second have two
    loaded, flags = ppg.load_agent(run_dir / "agent.pt")
    assert vars(args) == before == vars(flags) | {"init_agent": str(runs[2])}
    begin = checkpoint(run_dir)  # there is no complete phase: this is the beginning
    assert flat(begin["agent"]) == flat(checkpoint(runs[2])["agent"]) != flat(agent.state_dict())
    assert flat(loaded.state_dict()) == flat(agent.state_dict())
    assert (begin["global_step"], begin["phase"], begin["optimizer"]["state"]) == (0, 0, {})
    assert not any(bytes(path) in data for path in (tmp_path, runs[2]) for data in files(run_dir).values())
    refused(f"{SMALL} --arch dual --init-agent {runs[2]}/agent.pt", f"{runs[2]}/agent.pt .* another network", capsys)


def test_tensorboard(tmp_path, monkeypatch):
    """The tags of the design at each rollout, complete phase and episode's end; all episodes, truncated ones too."""
    envs = Quadrants(4, stagger=3)  # in rollouts of 3 steps; the first has no end of an episode
    envs.return_range = (-1, 3)
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: envs)
    train(f"{SMALL} --run-dir {tmp_path} --num-steps 3 --total-timesteps {64 * 12 + 5}")
    logged, expected, returns = scalars(tmp_path), {}, []
    steps = range(12, 65 * 12 + 1, 12)  # 65 rollouts: rounded up, the last phase incomplete
    for step in steps:
        ended = [episode for clock, *episode in envs.ended if step - 12 < 4 * clock <= step]
        returns += [total for total, _ in ended]
        values = {"episodes": len(ended), "episodic_return_100": np.mean(returns[-100:] or np.nan)}
        if ended:
            values["episodic_return"], values["episodic_length"] = np.mean(ended, axis=0)
            values["normalized_return"] = (values["episodic_return"] + 1) / 4
        for name, value in values.items():
            expected.setdefault(f"charts/{name}", {})[step] = value
    assert len(returns) > 105 and envs.ended[0][0] > 3
    assert all(logged.pop(tag) == pytest.approx(points, nan_ok=True) for tag, points in expected.items())
    rollouts = "charts/SPS charts/learning_rate time/rollout time/policy_phase losses/clipfrac losses/policy_loss"
    rollouts += " losses/value_loss losses/entropy losses/approx_kl losses/explained_variance"
    phases = ["losses/aux/kl_loss", "losses/aux/aux_value_loss", "losses/aux/real_value_loss", "time/auxiliary_phase"]
    assert logged.keys() == {*rollouts.split(), *phases}
    assert all(list(points) == list(steps[1::2] if tag in phases else steps) for tag, points in logged.items())
    at_once = ppg.EpisodeStatistics(150)(torch.arange(149.0, -1, -1)[:, None], torch.ones(150, 1), envs)
    assert at_once["charts/episodic_return_100"] == 49.5  # of the last 100 environments, not of the best episodes
    text = str(EventAccumulator(str(tmp_path)).Reload().Tensors("hyperparameters/text_summary"))
    assert all(f"|{flag[2:].replace('-', '_')}|" in text for flag in FLAGS) and "|total_timesteps|773|" in text


def test_time_left(tmp_path, monkeypatch, capsys):
    """`left` is unknown in the first phase, whose end is told after an auxiliary epoch, then goes by the rate of the
    last phase and counts the auxiliary phase to come. The summary has the rate and the shares of the later phases."""
    now, phases = [0.0], [(30, 30, "3", "?"), (15, 35, "2", "0:01:45"), (20, 130, "2", "0:00:30")]
    monkeypatch.setattr(ppg.time, "perf_counter", lambda: now[0])
    log = ppg.Log(parse(f"{SMALL} --n-pi 25 --num-steps 1 --e-aux 3"), tmp_path, 0, 300)
    metrics = {"charts/episodes": 0, "charts/episodic_return_100": 0, "losses/explained_variance": 0}
    for phase, (policy, auxiliary, rate, left) in enumerate(phases, 1):
        log.start_phase()
        now[0] += policy
        log.lap("policy_phase")
        log.write_iteration(100 * phase, metrics | {"losses/approx_kl": 0})
        assert capsys.readouterr().out.endswith(f"| {rate} steps/s | left {left}\n")
        now[0] += auxiliary / 2
        log.print_auxiliary_epoch(phase, 1)
        assert ("this phase ends in about 0:00:30\n" in capsys.readouterr().out) == (
            phase == 1
        )  # 2 epochs of 15 seconds
        now[0] += auxiliary / 2
        log.lap("auxiliary_phase")
    log.print_summary()
    assert "| 1 steps/s after the first phase | policy phase 18%" in capsys.readouterr().out  # 200 in 200 seconds


def test_script(tmp_path):
    """The script trains on the real game and prints a line for each rollout and auxiliary epoch; stderr stays empty.
    Its resident memory after 30 rollouts is within 1 % of that after 10."""
    process = start(f"{SMALL} --e-aux 2 --num-steps 4 --total-timesteps {32 * 16} --run-dir {tmp_path}")
    first, second = process.stdout.readline(), process.stdout.readline()
    assert re.match(r"chaser easy, all levels . shared, 626,513 parameters . 4 environments x 4 steps, N_pi 2 .", first)
    assert second == f"run directory {tmp_path} | first checkpoint at step 32\n"
    read_until(process, "step 16/512 3.1%", "step 32/", "  auxiliary phase 1, epoch 1/2 | ")
    kilobytes = []
    for rollouts in (8, 20):
        read_until(process, *["step"] * rollouts)
        kilobytes.append(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]))
    read_until(process, "  auxiliary phase 16, epoch 1/2 | ", "  auxiliary phase 16, epoch 2/2 | ", "done in")
    assert finish(process) == (0, [], []) and kilobytes[1] == pytest.approx(kilobytes[0], rel=0.01)


# ------------------------------------------------------------------------------------------------------------ bad input
def test_bad_input(tmp_path, monkeypatch, capsys):
    """Bad input ends, before an environment is made, with one line that says what is wrong."""
    table = """
starpilot|easy, hard <- --env-id starpliot; --env-id bigfish --distribution-mode memory
from 1 to 1e.12 <- --total-timesteps 1,000,000; --num-envs 0; --num-steps 2.5
from 0 to <- --gamma -0.1; --gamma 1.001; --gamma nan; --gae-lambda 1.5; --reward-norm-gamma 2; --seed -1
from 0 to <- --clip-coef -0.1; --kl-coef -0.1; --ent-coef -0.1; --beta-clone -0.1; --max-grad-norm -0.1
--learning-rate: <- --learning-rate 0; --learning-rate inf; --learning-rate high
--num-(aux-)?minibatches <- --num-envs 8 --num-aux-minibatches 16; --num-minibatches 3
no multiple of (8|64) .*x processes <- --num-aux-minibatches 4; --num-minibatches 32
--(agent|evaluate) <- --evaluate 5; --evaluate 5 --agent {tmp} --resume {tmp}; --agent {tmp}; --capture-video
cannot load .*(agent|checkpoint).pt <- --resume {tmp}; --resume ""; --evaluate 5 --agent ""; --evaluate 5 --agent run
--arch shared|policy-phase <- --arch dual --detach-value never; --detach-value policy
level <- --start-level 5; --env-id maze --distribution-mode exploration --num-levels 5
--total-timestep 64|--device cuda <- --total-timestep 64; --device cuda
{tmp}/(file/below|run already holds a run; --resume {tmp}/run) <- --run-dir {tmp}/file/below; --run-dir {tmp}/run
needs 21.2 GB.* only 8.0 GB .* lower --n-pi or --num-envs <- --num-envs 1e5 --total-timesteps 25e6
"""
    (tmp_path / "file").touch(), (tmp_path / "run").mkdir(), (tmp_path / "run" / "agent.pt").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ppg, "free_memory", lambda: 8_000_000_000)
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: pytest.fail("environments were made"))
    monkeypatch.chdir(tmp_path)
    for line in table.format(tmp=tmp_path).strip().splitlines():
        pattern, _, flags = line.partition(" <- ")
        monkeypatch.setattr(ppg, "WORLD_SIZE", 2 if "processes" in pattern else 1)
        for each in flags.split("; "):
            refused(f"{SMALL} {each}", pattern, capsys)
    assert parse("--total-timesteps 1e+12").total_timesteps == 10**12


def test_unfit_environments(tmp_path, monkeypatch, capsys):
    """An environment that the script cannot train on, would misread or cannot film, is refused in one line."""
    for pattern, name, value in (
        ("must be uint8 .* not float32", "draw", lambda: np.ones((4, 32, 32, 3), np.float32)),
        ("channels last, not .* .4, 3, 32, 32.$", "draw", lambda: np.zeros((4, 3, 32, 32), np.uint8)),
        (r"must be .* \[4, H, W, C\]", "draw", lambda: np.zeros((2, 32, 32, 3), np.uint8)),
        (r"must be .* \[4, H, W, C\]", "draw", lambda: np.zeros((4, 32), np.uint8)),
        ("actions must be Discrete", "single_action_space", gym.spaces.MultiDiscrete([2, 2])),
        ("actions must be Discrete", "single_action_space", gym.spaces.Discrete(4, start=1)),
        ("SAME_STEP, not AutoresetMode.NEXT_STEP", "metadata", {"autoreset_mode": AutoresetMode.NEXT_STEP}),
        ("--capture-video needs a method `record`", "metadata", None),
    ):
        envs = Quadrants(4)
        setattr(envs, name, value)
        monkeypatch.setattr(ppg, "make_envs", lambda *_, envs=envs, **__: envs)
        refused(f"{SMALL} --run-dir {tmp_path} --eval-episodes 1 --capture-video", pattern, capsys)
        assert not files(tmp_path)


def test_free_memory(tmp_path):
    """The least of MemAvailable and what the limits of the process's cgroup and of all its parents leave; files that
    were read (inactive_file) count as free. Without /proc, nothing is known to be the limit."""
    assert ppg.free_memory(tmp_path) == np.inf
    (tmp_path / "proc/self").mkdir(parents=True), (tmp_path / "sys/fs/cgroup/a/b/c").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 1000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    for group, free in ("a/b/c", 1024_000), ("a/b", 400), ("a", 400), (".", 400):
        for name, text in {"current": "350", "stat": "file 70\ninactive_file 50\n", "max": "700"}.items():
            (tmp_path / "sys/fs/cgroup" / group / f"memory.{name}").write_text(text)
        assert ppg.free_memory(tmp_path) == free, group
        (tmp_path / "sys/fs/cgroup" / group / "memory.max").write_text("max")


# ----------------------------------------------------------------------------------------- checkpoints and interruption
@pytest.mark.parametrize("first, last", [(32, 128), (64, 128), (96, 224)])
def test_resume_is_exact(tmp_path, first, last):
    """A run that ended at a phase boundary, or inside, and is extended ends as in one go, with its eval/* scalars."""
    flags = {64: "--env-id coinrun --arch dual --e-pi 2", 96: "--e-v 2 --num-levels 9 --eval-episodes 1"}
    for name, steps in ("one_go", last), ("extended", first):
        train(f"{SMALL} {flags.get(first, '')} --run-dir {tmp_path / name} --total-timesteps {steps}")
    train(f"--resume {tmp_path / 'extended'} --total-timesteps {last}")
    assert content(tmp_path / "extended") == content(tmp_path / "one_go")


def test_killed_at_any_moment(tmp_path):
    """Killed by SIGKILL at 4 random moments, two of them meant to be while a checkpoint is written, and resumed each
    time, the script ends as if left alone; at each moment the checkpoint is complete."""
    flags, run_dir, random = f"{SMALL} --num-steps 4 --total-timesteps 320", tmp_path / "run", np.random.default_rng(1)
    train(f"{flags} --run-dir {tmp_path / 'left_alone'}")
    partial_file, while_writing, positions = run_dir / "checkpoint.partial", 0, []
    for kill in range(4):
        if kill % 2:
            partial_file.unlink(missing_ok=True)  # what an earlier kill left; the other runs find it
        process = start(f"--resume {run_dir}" if kill else f"{flags} --run-dir {run_dir}")
        read_until(process, "chaser", "step", *[""] * (random.integers(4) if kill else 0))  # first within a phase
        while kill % 2 and process.poll() is None and not partial_file.exists():
            time.sleep(0.0005)
        time.sleep(0 if kill % 2 else random.uniform(0, 0.1))
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        while_writing += kill % 2 and partial_file.exists()
        positions.append(checkpoint(run_dir)["global_step"])
    assert while_writing and positions[0] == 0 and positions == sorted(positions)
    train(f"--resume {run_dir}")
    assert content(run_dir) == content(tmp_path / "left_alone")


@pytest.mark.parametrize("flags, saved", [("", "64|128"), ("--checkpoint-every 0", "nothing")])
def test_signals(tmp_path, flags, saved):
    """Ctrl-C and SIGTERM end a run with one line: where it was, up to which step it is saved, how it is continued."""
    process = start(f"{SMALL} --total-timesteps {3 * PHASE} --run-dir {tmp_path}/run {flags}")
    read_until(process, "step 64/", "step 96/")
    process.send_signal(signal.SIGTERM if flags else signal.SIGINT)
    status, _, (error,) = finish(process)
    saved = saved if flags else f"up to step ({saved}): --resume {tmp_path}/run"
    stopped = re.fullmatch(f"stopped at step (?:96|128|160|192), saved {saved}", error)
    assert status == 1 and stopped and (flags or int(stopped[1]) == checkpoint(tmp_path / "run")["global_step"])


def test_flags_given_with_resume(run_dir, capsys):
    """With --resume, the flags are the run's, wherever it was moved. One that contradicts them is refused in one line,
    which names it and those that may change. One that the run does not know brings a warning."""
    before, data = vars(parse(f"--resume {run_dir}")), checkpoint(run_dir)
    assert before == data["args"] | {"resume": str(run_dir), "run_dir": str(run_dir)}
    new = {"total_timesteps": 999, "checkpoint_every": 3, "device": "auto", "eval_episodes": 5, "capture_video": True}
    flags = "--total-timesteps 999 --checkpoint-every 3 --device auto --eval-episodes 5 --capture-video"
    assert vars(parse(f"--resume {run_dir} --run-dir {run_dir} {SMALL} --learning-rate 5e-4 {flags}")) == before | new
    others = EFFECTS | {"--compile": "", "--exp-name": "other", "--run-dir": "elsewhere", "--init-agent": run_dir}
    for flag in others.keys() - {"--total-timesteps", "--checkpoint-every"}:
        name, names = flag[2:].replace("-", "_"), ", ".join(sorted({*new, "resume"}))
        pattern = f"{name} is {before[name]} in the saved run, and only {names} may change"
        refused(f"--resume {run_dir} {flag} {others[flag]}", pattern, capsys)
    del data["args"]["max_grad_norm"]
    ppg.save(run_dir / "checkpoint.pt", data | {"agent": {}})
    refused(f"--resume {run_dir}", f"{run_dir} was saved by a script with another agent", capsys)
    ppg.save(run_dir / "checkpoint.pt", data)
    train(f"--resume {run_dir} --total-timesteps {3 * PHASE}")
    assert re.match(
        "warning: .* this script .*max_grad_norm, which is 0.0\n(.*\n)+continuing from step 128\n",
        capsys.readouterr().out,
    )
    assert checkpoint(run_dir)["args"]["max_grad_norm"] == 0


def test_checkpoint_every(tmp_path, monkeypatch):
    """--checkpoint-every K saves at the start, at every K-th phase and at the last, 0 never; a complete run stays."""
    monkeypatch.setattr(ppg, "save", Mock(wraps=ppg.save))
    for phases, every, expected in (1, 0, []), (4, 2, [0, 2, 4]), (5, 3, [0, 3, 5]):
        run_dir, flags = tmp_path / str(every), f"{SMALL} --n-pi 1 --total-timesteps {phases * ROLLOUT}"
        ppg.save.reset_mock()
        train(f"{flags} --checkpoint-every {every} --run-dir {run_dir}")
        assert [data["phase"] for (path, data), _ in ppg.save.call_args_list if path.stem == "checkpoint"] == expected
    before, _ = content(run_dir), ppg.save.reset_mock()
    train(f"--resume {run_dir}")
    saved = [path.name for (path, _), _ in ppg.save.call_args_list]
    assert content(run_dir) == before and saved == ["checkpoint.pt"]  # agent.pt may be newer than the checkpoint


def test_full_disk(run_dir, runs):
    """Where the checkpoint cannot be written, the run ends with a traceback whose last line says why; the checkpoint is
    as it was, and the run can be resumed exactly. A new checkpoint replaces the file and never writes into the old."""
    before, unfinished = files(run_dir), run_dir / "checkpoint.partial"
    unfinished.symlink_to("/dev/full"), os.link(run_dir / "checkpoint.pt", run_dir / "old")
    status, _, errors = finish(start(f"--resume {run_dir} --total-timesteps {3 * PHASE}"))
    unfinished.unlink(missing_ok=True)
    assert status == 1 and "No space left on device" in errors[-1] and files(run_dir) == before
    train(f"--resume {run_dir} --total-timesteps {3 * PHASE}")
    assert content(run_dir) == content(runs[3]) and (run_dir / "old").read_bytes() == before["checkpoint.pt"]


def test_files_that_do_not_load(run_dir, monkeypatch, capsys):
    """A checkpoint or an agent that is changed in a bit, cut short, carries code or is missing is refused in one line
    that names the file and the reason; no code is run and no file changes. Nor is a checkpoint taken for an agent."""
    new = f"{SMALL} --run-dir {run_dir.with_name('new')} --init-agent {run_dir}"
    refused(f"{new}/checkpoint.pt", f"{run_dir}/checkpoint.pt is not an agent.pt", capsys)
    monkeypatch.chdir(run_dir)
    code = type("", (), {"__reduce__": lambda _: (os.mkdir, ("code_was_run",))})()
    harms = {"it is damaged": lambda path, data: path.write_bytes(data[:999] + bytes([data[999] ^ 1]) + data[1000:])}
    harms |= {".* zip ": lambda path, data: path.write_bytes(data[:1_000_000])}
    harms |= {"posix.mkdir is neither a tensor": lambda path, _: torch.save({"args": code}, path)}
    harms |= {".*No such file": lambda path, _: path.unlink()}
    commands = [(f"--resume {run_dir}", "checkpoint"), (f"--evaluate 5 --agent {run_dir}", "agent"), (new, "agent")]
    for reason, harm in harms.items():
        for name, data in files(run_dir).items():
            harm(run_dir / name, data)
        before = files(run_dir), os.listdir()
        for flags, name in commands:
            refused(flags, f"cannot load {run_dir}/{name}.pt: {reason}", capsys)
        assert (files(run_dir), os.listdir()) == before


def test_states_of_environments(tmp_path, monkeypatch, capsys):
    """Without state_dict, environments begin anew at --resume, which a line says. A state that holds more than tensors
    and plain values, or a flag that does, ends the run at its beginning, in one line that names the type."""
    envs = Quadrants(4, length=1000)
    monkeypatch.setattr(ppg, "make_envs", lambda *_, **__: envs)
    for flags in f"{SMALL} --run-dir {tmp_path}", f"--resume {tmp_path} --total-timesteps {2 * PHASE}":
        train(flags)
    assert len(re.findall("^warning: .*state_dict", capsys.readouterr().out, re.MULTILINE)) == 1
    (rank,) = checkpoint(tmp_path)["ranks"]
    returns, lengths = rank["episodes"]["running"].T
    assert (lengths == 16).all() and 0 < returns.max() <= 8
    assert (rank["reward_normalizer"]["discounted_returns"] <= returns).all()
    args = parse(f"{SMALL} --run-dir {tmp_path / 'new'}")
    envs.state_dict, envs.clock = lambda: {"steps": envs.steps}, 0
    refused(args, "numpy", capsys)
    args.exp_name, envs.state_dict = Path("mine"), dict
    refused(args, "pathlib.PosixPath is neither a tensor nor a plain value", capsys)
    assert envs.clock == 0 and not files(tmp_path / "new")


@pytest.mark.parametrize("part", ["optimizer", "aux_optimizer", "parameter", "reward"])
def test_not_finite(run_dir, monkeypatch, part):
    """A learning rate that is too large, or a reward that is no number, stops the run, which names the loss or
    parameter that is no number and the step; checkpoint and weights stay those of the phase before."""
    names = {"aux_optimizer": "kl_loss is not finite after step 192", "parameter": "encoder.* finite after step 160"}
    observe, data = ProcgenGym3Env.observe, checkpoint(run_dir)
    if part == "reward":
        monkeypatch.setattr(ProcgenGym3Env, "observe", lambda envs: (observe(envs)[0] * np.nan, *observe(envs)[1:]))
    else:
        data[part if part in data else "optimizer"]["param_groups"][0]["lr"] = 1e39
    change = {"num_minibatches": 1, "e_aux": 0, "n_pi": 1} if part == "parameter" else {}  # one step in the phase
    data["args"] |= {"total_timesteps": 3 * PHASE, **change}
    ppg.save(run_dir / "checkpoint.pt", data)
    with pytest.raises(FloatingPointError, match=names.get(part, "losses/policy_loss is not finite after step 160")):
        train(f"--resume {run_dir}")
    assert flat(checkpoint(run_dir)) == flat(data) and ppg.load(run_dir / "agent.pt")["global_step"] == 2 * PHASE


def test_compile(tmp_path, monkeypatch):
    """--compile gives the eager gradients, and None to a network whose epochs are over and to a head without a loss.
    Where it finds no compiler it says so, and the run goes to its end without."""
    flags, steps = f"{SMALL} --arch dual --e-pi 2 --e-aux 0 --total-timesteps {ROLLOUT} --precision fp32", []
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start(f"{SMALL} --run-dir {tmp_path / 'run'} --compile", env=environment)
    monkeypatch.setattr(ppg, "average_gradients", lambda agent: steps.append([p.grad for p in agent.parameters()]))
    for flag in ("--no-compile", "--compile"):
        train(f"{flags} {flag} --run-dir {tmp_path / flag}")
    nones = [[gradient is None for gradient in step] for step in steps]
    assert len(steps) == 8 and nones[:4] == nones[4:]
    torch.testing.assert_close(steps[4:6], steps[:2], rtol=1e-3, atol=1e-5)
    status, _, errors = finish(process)
    assert status == 0 and "compiler" in " ".join(errors) and checkpoint(tmp_path / "run")["global_step"] == PHASE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_gpu(tmp_path, capsys):
    """On a GPU, networks and buffer are there, in TF32 and bf16; a run goes on there or on a CPU."""
    agent = train(f"{SMALL} --device auto --run-dir {tmp_path}")
    first_line = capsys.readouterr().out.splitlines()[0]
    assert (
        re.search("policy phase TF32, auxiliary phase bf16 .* on cuda", first_line) and agent.value_head.weight.is_cuda
    )
    for steps, device in (2 * PHASE, "cuda"), (3 * PHASE, "cpu"):
        agent = train(f"--resume {tmp_path} --total-timesteps {steps} --device {device}")
        assert checkpoint(tmp_path)["global_step"] == steps and agent.value_head.weight.device.type == device


# ------------------------------------------------------------------------------------------------ evaluation and video
def test_evaluation(monkeypatch, capsys):
    """Held-out levels are those after the training levels; if all are trained on, they are called fresh. Each
    environment plays as many episodes, lest short ones count more. No global random numbers are drawn or matter."""
    for held_out, levels in (False, range(5, 25)), (True, range(25, 2**31)):
        envs, seen = ppg.make_envs(parse(EVAL), 5, 1, held_out=held_out), set()
        for _ in range(20):
            seen |= {int(info["level_seed"]) for info in envs.procgen.get_info()}
            envs.step(np.full(5, -1))
        assert len(seen) > 10 and all(level in levels for level in seen)
    assert ppg.return_metrics("x", np.array([6.75]), envs) == {"x/episodic_return": 6.75, "x/normalized_return": 0.5}
    agent, made = ppg.Agent((16, 16, 3), 4, "shared"), [Quadrants(64, length=1, stagger=1, size=16) for _ in range(3)]
    monkeypatch.setattr(ppg, "make_envs", Mock(side_effect=made))
    for seed, flags in enumerate((EVAL, SMALL)):
        torch.manual_seed(seed), np.random.seed(seed)
        before = torch.get_rng_state().tolist(), str(np.random.get_state())
        logged = ppg.evaluate(parse(flags), agent, CPU, 130, None)
        assert (torch.get_rng_state().tolist(), str(np.random.get_state())) == before
    returns = [[[r for _, r, length in envs.ended if length == n][:3] for n in range(1, 65)] for envs in made]
    assert [call.kwargs["held_out"] for call in ppg.make_envs.call_args_list] == [False, True, True]
    assert returns[0] == returns[1] == returns[2]
    assert logged == {"eval/episodic_return": pytest.approx(np.mean(returns))}
    line = f"return {np.mean(returns):.2f} +- {np.std(returns) / 192**0.5:.2f}, 192 episodes"
    levels = re.findall(rf" on (\S+) levels: {re.escape(line)}", capsys.readouterr().out)
    assert levels == ["training", "held-out", "fresh"]


def test_evaluating_an_agent(tmp_path, capsys):
    """--evaluate K --agent PATH plays an agent.pt from anywhere, beside its run, and writes nothing. It prints what an
    evaluation within the run does, by other flags if they are given, and films an agent into its run's directory, in
    which no second run may be."""
    run, flags = tmp_path / "run", "--distribution-mode hard --num-levels 0 --start-level 0 --precision bf16"
    train(f"{EVAL} --run-dir {run} --total-timesteps {PHASE}")
    logged = {tag: points[PHASE] for tag, points in scalars(run, "eval/").items()}
    process = start(f"--resume {run} --total-timesteps 1e9 --eval-episodes 0")
    read_until(process, "step")
    process.send_signal(signal.SIGSTOP)
    for arguments in f"{EVAL} --run-dir {run}", f"--resume {run}":
        refused(arguments, "another process", capsys)
    agent, before = shutil.copy(run / "agent.pt", tmp_path / "copy.pt"), {*tmp_path.rglob("*")}
    status, (line, *output), errors = finish(start(f"--evaluate 5 --agent {agent}", cwd=tmp_path))
    assert (status, errors) == (0, []) and line.startswith(f"{agent}: chaser easy, ")
    pattern = r"levels: return (\S+) \+- \S+, normalised \S+, 5 episodes"
    training, held_out = (float(re.search(pattern, line)[1]) for line in output)
    expected = logged["eval/episodic_return"], logged["eval/generalization_gap"]
    assert (held_out, training - held_out) == pytest.approx(expected, abs=0.011) and {*tmp_path.rglob("*")} == before
    status, output, errors = finish(start(f"--evaluate 1 --agent {run} {flags} --capture-video"))
    (film,) = (run / "videos").iterdir()
    assert (status, errors) == (0, []) and re.fullmatch(r"run-20\d\d(-\d\d){5}-00000.mp4", film.name)
    assert output[0].startswith(f"{run}: chaser hard, ") and output[2:] == [f"  film: {film}"]


def test_evaluations_of_a_run(tmp_path, monkeypatch, runs):
    """An evaluation that fails loses nothing of its phase. --capture-video films an episode after each phase, 512 x
    512. Training is bit-identical without it and the evaluation, which is logged after each phase."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(ppg, "evaluate", lambda *_: 1 / 0)
        train(f"{SMALL} --eval-episodes 1 --capture-video --run-dir {tmp_path} --total-timesteps {3 * PHASE}")
    assert ppg.load(tmp_path / "agent.pt")["global_step"] == checkpoint(tmp_path)["global_step"] == PHASE
    train(f"--resume {tmp_path}")
    assert flat(checkpoint(tmp_path)["agent"]) == flat(checkpoint(runs[3])["agent"])
    assert [list(points) for points in scalars(tmp_path, "eval/").values()] == [[2 * PHASE, 3 * PHASE]] * 2
    (first, *others), _ = (imageio.mimread(film, memtest=False) for film in (tmp_path / "videos").iterdir())
    assert {film.name for film in (tmp_path / "videos").iterdir()} == {"step-128-00000.mp4", "step-192-00000.mp4"}
    assert len(others) > 5 and first.shape == (512, 512, 3) and any((frame != first).any() for frame in others)


# --------------------------------------------------------------------------------------------- requirements and README
def test_requirements():
    """The script's own list of its dependencies is requirements.txt for Python 3.11 and later, but for the tests'."""
    own = re.findall('"(.*?)"', SCRIPT.read_text().partition("dependencies =")[2].partition("# ///")[0])
    lines = SCRIPT.with_name("requirements.txt").read_text().splitlines()
    needed = {re.split(" *[;#]", line)[0] for line in lines if not re.search('^pytest|^ale|^gymnasium|< "3.11"', line)}
    assert needed == set(own)


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_readme(tmp_path, runs, monkeypatch, capsys):
    """Every flag in the README exists, every command line of the script parses and finds what it names, .ci/run runs
    the tests' command, the Python lines play an agent, and Algorithm 1's marks stand in `train`, in their order."""
    shutil.copytree(runs[2], tmp_path / "runs" / "demo")
    (tmp_path / "results").symlink_to(SCRIPT.with_name("results"))
    monkeypatch.chdir(tmp_path)
    (tests,) = (line for line in "".join(code_blocks("bash")).splitlines() if "pytest" in line)
    assert tests in SCRIPT.with_name(".ci").joinpath("run").read_text()
    others = r"\b(pip|pytest|tensorboard|git|curl|uv|torchrun|venv)\b[^`\n;&|]*"
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(others, "", README)))
    assert named and named <= FLAGS
    blocks = "\n".join(code_blocks("bash")).replace("$s", "1")
    commands = re.findall(r"(?:python|torchrun|uv)[^\n;&|#]* ppg_procgen\.py([^\n;&|#>]*)", blocks)
    assert len([parse(flags) for flags in commands]) > 6
    (snippet,) = code_blocks("python")
    exec(snippet, {})  # noqa: S102
    assert re.search(r"return \d", capsys.readouterr().out)
    rows = re.findall(r"^\| .* \| `(.*)` \|$", README.partition("## PPG in one")[2].partition("##")[0], re.MULTILINE)
    places = [SCRIPT.read_text().index(mark, SCRIPT.read_text().index("def train")) for mark in rows]
    assert len(rows) >= 8 and places == sorted(places)


QUADRANTS = "--env-id quadrants --arch shared --num-envs 16 --num-steps 64 --gamma 0.9 --total-timesteps 16_384"
RECIPES = [(f"{QUADRANTS} --total-timesteps 8192 --e-aux 1", r"step 8,192/8,192 100.0% . return (9|10)\.")]
RECIPES += [(f"{SMALL} --env-id breakout", "breakout easy"), (SMALL, "chaser easy")]
RECIPES += [(SMALL, "110,417 parameters"), (SMALL, "shift_loss")]


@pytest.mark.parametrize("recipe", range(len(RECIPES)))
def test_recipes(tmp_path, recipe):
    """Each of the README's diffs applies to the script, and the result trains, the first to the return that is
    promised. The one for EnvPool's Procgen only trains if envpool, a gigabyte, is installed."""
    flags, sign = RECIPES[recipe]
    assert QUADRANTS in README
    shutil.copy(SCRIPT, tmp_path)
    diff = code_blocks("diff")[recipe]
    subprocess.run(["git", "apply", "-"], input=diff, text=True, check=True, cwd=tmp_path)
    if "envpool" not in diff or find_spec("envpool"):
        status, output, errors = finish(start(flags, script=SCRIPT.name, cwd=tmp_path))
        assert (status, errors) == (0, []) and re.search(sign, "\n".join(output))


# ----------------------------------------------------------------------------------------- several processes (torchrun)
RANKS_RUN = f"{SMALL} --env-id bossfight --num-envs 8 --num-steps 16"  # a rollout has 128 steps


def rank_main(folder):
    """What each process of the next test does: a run of the script that ends within its first phase, which starts the
    process group, a phase of Procgen, then two whose data do not depend on the number of processes."""
    sys.argv = [str(SCRIPT), *f"{RANKS_RUN} --num-steps 1 --total-timesteps 8 --run-dir {folder}/script".split()]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    share = 8 // ppg.WORLD_SIZE
    ppg.free_memory = lambda: 10**12  # these take little; a real run of 4 processes wants 6 GB
    agent = train(f"{RANKS_RUN} --total-timesteps 256 --run-dir {folder}/procgen")
    episodes = ppg.EpisodeStatistics(share)
    times = torch.arange(20) + (ppg.RANK * share + torch.arange(share)[:, None]) / 8
    episodes(times, torch.ones(share, 20), None)  # every step is an episode, whose return tells its time
    results = {"procgen": agent.state_dict(), "recent": episodes.recent}
    results["evaluation"] = flat(ppg.evaluate(parse(RANKS_RUN), agent, CPU, 5, None))

    def act_by_image(agent, obs, bf16):
        logits, _, values = agent(obs, bf16)
        actions = obs[:, 0, 0, 0].long() % 4
        return actions, logits.detach().log_softmax(-1)[range(len(obs)), actions], values.detach()

    def even_then_odd(rows):
        """Halves equal on 1, 2 or 4 ranks: a rollout's even and odd steps, or (auxiliary phase) environments."""
        return torch.arange(rows).view(2 if rows == 2 * share else 1, -1, 2).mT.flatten()

    ppg.make_envs = lambda *_: Quadrants(share, stagger=1, scale=1, size=8, first=ppg.RANK * share)
    ppg.act, torch.randperm = act_by_image, even_then_odd
    torch.set_default_dtype(torch.float64)
    for name, flags in ("dual", "--e-v 2 --num-steps 40"), ("shared", "--e-aux 2 --num-steps 24"):
        run = f"{RANKS_RUN} --arch {name} {flags} --total-timesteps 384 --precision fp32 --run-dir {folder}/{name}"
        results[name] = train(run).state_dict()
    torch.save(results, Path(folder, f"{ppg.RANK}.pt"))


def test_processes_do_not_change_the_mathematics(tmp_path):
    """A phase in 2 or 4 processes gives the parameters, on every rank, and the logged values of one process whose
    minibatches are the unions of the ranks', though each has rewards of another scale. On Procgen, each has levels,
    actions and, but for chance, seeds of its own, rank 0 the seed itself; yet all end with the same parameters, bit for
    bit, and know the last 100 returns of all, in order of time, and those of an evaluation that they shared."""
    assert [finish(process)[0] for process in [start(f"{tmp_path}/{n}", __file__, n) for n in (1, 2, 4)]] == [0] * 3
    results = {n: [torch.load(tmp_path / f"{n}/{rank}.pt") for rank in range(n)] for n in (1, 2, 4)}
    assert results[1][0]["dual"]["value_head.bias"].dtype == torch.float64
    for n in (2, 4):
        for name in ("dual", "shared"):
            expected = [results[1][0][name]] * n
            torch.testing.assert_close([result[name] for result in results[n]], expected, rtol=0, atol=1e-9)
            logged, expected = (scalars(tmp_path / f"{processes}/{name}", UNTIMED) for processes in (n, 1))
            assert logged.keys() == expected.keys() and sum(expected["charts/episodes"].values()) > 10
            for tag, points in expected.items():
                assert logged[tag] == pytest.approx(points, rel=1e-5, abs=1e-9, nan_ok=True), tag
        at_start = checkpoint(tmp_path / f"{n}/script")["ranks"]
        assert len(torch.cat([rank["next_obs"] for rank in at_start]).flatten(1).unique(dim=0)) == 8
        assert len({rank["cpu_random"].numpy().tobytes() for rank in at_start}) == n
        for result in results[n]:
            assert flat(result["procgen"]) == flat(results[n][0]["procgen"])
            assert torch.equal(result["recent"], torch.arange(60, 160, dtype=torch.float64) / 8)
            assert result["evaluation"] == results[n][0]["evaluation"]
    streams = np.array([[ppg.rank_seed(seed, rank) for rank in range(64)] for seed in range(1000)])
    assert (streams[:, 0] == range(1000)).all() and streams.min() >= 0 and streams.max() < 2**31
    assert len(np.unique(streams)) >= streams.size - 10


def test_runs_of_two_processes(tmp_path, capsys):
    """Rank 0 alone prints and writes, for all. Where a rank is killed, all end within a minute, and --resume goes on to
    the same end, bit for bit, if not in one process. On Ctrl-C all end, and one line says what is saved."""
    whole, killed, stopped = (tmp_path / name for name in ("whole", "killed", "stopped"))
    process = start(f"{RANKS_RUN} --total-timesteps 768 --run-dir {killed}", processes=2)
    read_until(process, "step 384")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (pid,) = (int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(pid, signal.SIGKILL)
    assert finish(process, within=60)[0] != 0 and checkpoint(killed)["global_step"] in (256, 512)
    for flags in f"--resume {killed}", f"{RANKS_RUN} --total-timesteps 768 --run-dir {whole}":
        status, lines, errors = finish(start(flags, processes=2), OF_SCRIPT)
        assert (status, errors) == (0, [])
    assert content(killed) == content(whole)
    numbers = re.findall(r"^(?:step|  auxiliary phase) (\d+)", "\n".join(lines), re.MULTILINE)
    assert numbers == ["128", "256", "1", "384", "512", "2", "640", "768", "3"] and len(lines) == 2 + 9 + 1
    assert sorted(file.name.split(".")[0] for file in whole.iterdir()) == ["", "agent", "checkpoint", "events"]
    lengths, counts = (scalars(whole)[f"charts/{name}"] for name in ("episodic_length", "episodes"))
    under_way = sum(rank["episodes"]["running"][:, 1].sum() for rank in checkpoint(whole)["ranks"])
    assert under_way + sum(counts[step] * length for step, length in lengths.items()) == pytest.approx(768)
    refused(f"--resume {whole}", "has 2 processes: use torchrun", capsys)
    process = start(f"{RANKS_RUN} --total-timesteps 768 --run-dir {stopped}", processes=2)
    read_until(process, "step 384")
    os.killpg(process.pid, signal.SIGINT)
    status, _, (error,) = finish(process, OF_SCRIPT, within=60)
    saved = checkpoint(stopped)["global_step"]
    assert status and re.fullmatch(rf"stopped at step \d+, saved up to step {saved}: --resume {stopped}", error)


if __name__ == "__main__":
    rank_main(sys.argv[1])
