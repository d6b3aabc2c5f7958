"""Tests of ppg_procgen.py: each docstring is the claim. Procgen, TensorBoard files, processes and signals are real."""

import contextlib
import hashlib
import io
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import ppg_procgen as ppg

gym = ppg.gym
SCRIPT = Path(ppg.__file__)
README = SCRIPT.with_name("README.md")
FLAGS = {f"--{name.replace('_', '-')}" for name in vars(ppg.parse_args([]))}
# 2 rollouts of 32 steps, each followed by an auxiliary phase. Chaser rewards a random policy within a few steps.
TINY = (
    "--env-id chaser --arch shared --num-envs 4 --num-steps 8 --num-minibatches 2 --n-pi 1 --e-aux 1"
    " --num-aux-minibatches 2 --total-timesteps 64 --device cpu"
)


def tiny(run_dir, flags=""):
    return ppg.train(ppg.parse_args([*TINY.split(), "--run-dir", str(run_dir), *flags.split()]))


def python(*arguments, **environment):
    """A real process -> its exit status, lines of stdout, lines of stderr."""
    command, environment = [sys.executable, *map(str, arguments)], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SCRIPT.parent, check=False)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def events(run_dir):
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()


def scalars(run_dir):
    """TensorBoard's scalars of a run: {tag: {step: value}}."""
    return {tag: {e.step: e.value for e in events(run_dir).Scalars(tag)} for tag in events(run_dir).Tags()["scalars"]}


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def observe(folder, flags=""):
    """What a user sees of a tiny run in this folder: {"weights", "header", "steps", "path", "files"}, or the error."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        patch.chdir(folder)
        try:
            agent = ppg.train(ppg.parse_args([*TINY.split(), *flags.split()]))
        except SystemExit:
            return {"header": errors.getvalue()}
    run_dir = next(folder.rglob("agent.pt")).parent
    return {
        "weights": agent.state_dict(),
        "header": output.getvalue().splitlines()[0],
        "steps": {tag: list(points) for tag, points in scalars(run_dir).items()},
        "files": sorted(file.name for file in run_dir.glob("*.pt")),
        "path": re.sub(r"__\d+$", "", str(run_dir.relative_to(folder))),
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return observe(tmp_path_factory.mktemp("base"))


@pytest.fixture
def record(monkeypatch):
    """Every minibatch of a run: what was gathered into it, the optimizer, and the parameters that its step left."""
    calls, real_gather, real_train = [], ppg.gather, ppg.train_minibatch

    def recording_gather(rows, device, *data):
        calls.append({"rows": rows, "data": data, "obs": data[0].clone(), "targets": data[-1].clone()})
        return real_gather(rows, device, *data)

    def recording_train(optimizer, *rest):
        parts = real_train(optimizer, *rest)
        weights = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        calls[-1] |= {"optimizer": optimizer, "weights": weights}
        return parts

    monkeypatch.setattr(ppg, "gather", recording_gather)
    monkeypatch.setattr(ppg, "train_minibatch", recording_train)
    return calls


class Quadrants(gym.vector.VectorEnv):
    """The bright quadrant names the right action of 4, each 2nd step pays for the one before; 4 steps an episode."""

    best_return = 2

    def __init__(self, num_envs):
        super().__init__(num_envs, gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Discrete(4))
        self.random, self.returns = np.random.default_rng(0), []

    def draw(self):
        self.target = self.random.integers(0, 4, self.num_envs)
        images = self.random.integers(0, 128, (self.num_envs, 64, 64, 3), dtype=np.uint8)
        for image, (row, column) in zip(images, zip(*divmod(self.target, 2))):
            image[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] += 128
        return images

    def reset_wait(self, seed=None, options=None):
        self.steps, self.right = 0, np.zeros((4, self.num_envs))
        return self.draw(), {}

    def step_async(self, actions):
        self.right[self.steps % 4] = actions == self.target

    def step_wait(self):
        t, self.steps = self.steps % 4, self.steps + 1
        if t == 3:
            self.returns += (self.right[0] + self.right[2]).tolist()
        rewards = self.right[t - 1] if t % 2 else np.zeros(self.num_envs)
        return self.draw(), rewards, np.full(self.num_envs, t == 3), np.zeros(self.num_envs, bool), {}


def use(monkeypatch, envs):
    monkeypatch.setattr(ppg, "make_envs", lambda args: envs)
    return envs


# ----------------------------------------------------------------------------------------------------------------- math


def test_gae_is_its_definition():
    """A_t is the sum of (gamma lambda)^l delta_{t+l} up to the episode's end, and V^targ is A + V."""
    torch.manual_seed(0)
    N, T, gamma, gae_lambda = 5, 12, 0.9, 0.8
    rewards, values, dones = torch.randn(N, T), torch.randn(N, T + 1), (torch.rand(N, T) < 0.25).float()
    expected = torch.zeros(N, T)
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                next_value = 0 if dones[n, k] else values[n, k + 1]
                expected[n, t] += (gamma * gae_lambda) ** (k - t) * (rewards[n, k] + gamma * next_value - values[n, k])
                if dones[n, k]:
                    break
    advantages, targets = ppg.compute_gae(rewards, values, dones, gamma, gae_lambda)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(targets, expected + values[:, :-1])


RATIOS, ADVANTAGES = (1.5, 0.5, 1.5, 0.5, 1.1), (1.0, 1.0, -1.0, -1.0, 2.0)
LOG2 = [np.log(ratio) ** 2 for ratio in RATIOS]


@pytest.mark.parametrize(
    "clip_coef, kl_coef, loss, gradient",
    [
        (0.2, 0, -(1.2 + 0.5 - 1.5 - 0.8 + 2.2) / 5, [0, -0.5, 1.5, 0, -2.2]),
        (0, 0, -(1.5 + 0.5 - 1.5 - 0.5 + 2.2) / 5, [-1.5, -0.5, 1.5, 0.5, -2.2]),
        (0, 3, -2.2 / 5 + 1.5 * sum(LOG2) / 5, None),
        (0.2, 1, -1.6 / 5 + 0.5 * sum(LOG2) / 5, None),
    ],
)
def test_policy_loss_by_hand(clip_coef, kl_coef, loss, gradient):
    """Clipping acts above 1 + c on positive and below 1 - c on negative advantages only; the penalty is 1/2 log^2."""
    log_ratio = torch.tensor(RATIOS).log().requires_grad_()
    actual = ppg.policy_loss(log_ratio, torch.tensor(ADVANTAGES), clip_coef, kl_coef)
    assert actual.item() == pytest.approx(loss, rel=1e-5)
    if gradient:
        actual.backward()
        assert (5 * log_ratio.grad).tolist() == pytest.approx(gradient, rel=1e-5)


def test_losses_are_those_of_the_paper():
    """Policy phase: -L^clip - beta_S * entropy + L^value; auxiliary: L^aux + beta_clone * KL[pi_old, pi] + L^value."""
    torch.manual_seed(0)
    args = ppg.parse_args(["--ent-coef", "0.3", "--beta-clone", "0.7", "--clip-coef", "0.1"])
    agent, obs = ppg.Agent((8, 8, 3), 5, "shared"), torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8)
    logits, aux_values, values = agent(obs)
    old_logits, advantages, targets, actions = (
        torch.randn(6, 5),
        torch.randn(6),
        torch.randn(6),
        torch.randint(0, 5, (6,)),
    )
    old, new = (torch.distributions.Categorical(logits=x) for x in (old_logits, logits))
    log_ratio = new.log_prob(actions) - old.log_prob(actions)
    ratio, mse = log_ratio.exp(), lambda x: 0.5 * ((x - targets) ** 2).mean()

    loss, parts = ppg.policy_phase_loss(
        agent, args, False, True, True, (obs, actions, old.log_prob(actions), advantages, targets)
    )
    pi_loss = ppg.policy_loss(log_ratio, advantages, 0.1, 0)
    kl, clipped = (ratio - 1 - log_ratio).mean(), ((ratio < 0.9) | (ratio > 1.1)).float().mean()
    torch.testing.assert_close(parts, torch.stack([pi_loss, new.entropy().mean(), kl, clipped, mse(values)]).detach())
    torch.testing.assert_close(loss, pi_loss - 0.3 * new.entropy().mean() + mse(values))

    loss, parts = ppg.auxiliary_phase_loss(agent, args, False, (obs, old_logits, targets))
    kl = torch.distributions.kl_divergence(old, new).mean()
    torch.testing.assert_close(parts, torch.stack([kl, mse(aux_values), mse(values)]).detach())
    torch.testing.assert_close(loss, mse(aux_values) + 0.7 * kl + mse(values))


def test_actions_follow_the_policy():
    """Actions come as often as the policy has it, each with its own log-probability."""
    torch.manual_seed(0)
    agent = ppg.Agent((8, 8, 3), 3, "shared")
    agent.policy_head.bias.data = torch.tensor([0.5, 0.3, 0.2]).log()
    actions, logprobs, _ = ppg.act(agent, torch.zeros(20_000, 8, 8, 3, dtype=torch.uint8))
    assert (actions.bincount(minlength=3) / 20_000).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.02)
    assert logprobs.exp()[:50].tolist() == pytest.approx([(0.5, 0.3, 0.2)[a] for a in actions[:50]], rel=1e-4)


def test_reward_normalizer_against_naive():
    """Rewards are divided by the deviation of all discounted returns, this rollout's included, and clipped to +-10."""
    random = np.random.default_rng(0)
    normalize, seen, running, clipped = ppg.RewardNormalizer(3, 0.9), [], [0.0] * 3, 0
    for _ in range(4):
        rewards, dones = random.normal(size=(3, 400)), random.random((3, 400)) < 0.2
        rewards[1, 7] = -1000
        for n in range(3):
            for t in range(400):
                running[n] = 0.9 * running[n] + rewards[n, t]
                seen.append(running[n])
                running[n] *= not dones[n, t]
        count = 1e-4 + len(seen)  # the moments begin as if 1e-4 returns of mean 0 and variance 1 had been seen
        var = (1e-4 + np.square(seen).sum()) / count - (sum(seen) / count) ** 2
        expected = np.clip(rewards / np.sqrt(var + 1e-8), -10, 10)
        np.testing.assert_allclose(normalize(rewards, dones.astype(np.float32)), expected, rtol=1e-6)
        clipped += (np.abs(expected) == 10).sum()
    assert clipped > 0


def test_episode_statistics_against_naive():
    """Every episode that ends is counted, several in one step too, and the mean is over the last 100."""
    random = np.random.default_rng(0)
    episodes, expected, under_way = ppg.EpisodeStatistics(4), [], [[] for _ in range(4)]
    for _ in range(300):
        rewards, dones = random.normal(size=4), random.random(4) < 0.3
        episodes.update(rewards, dones.astype(np.float32))
        for n in range(4):
            under_way[n].append(rewards[n])
            if dones[n]:
                expected.append((sum(under_way[n]), len(under_way[n])))
                under_way[n] = []
    np.testing.assert_allclose(episodes.ended, expected)
    np.testing.assert_allclose(episodes.recent, [episode_return for episode_return, _ in expected[-100:]])


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("arch, parameters", [("shared", 626_513), ("dual", 1_248_657)])
def test_size_and_initialisation(arch, parameters):
    """The networks have the paper's size; every filter or output row begins with its norm, every bias with 0."""
    agent = ppg.Agent((64, 64, 3), 15, arch)
    assert sum(p.numel() for p in agent.parameters()) == parameters
    for name, layer in agent.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            norm = (
                0.1 if "head" in name else 1.4 if "dense" in name else (1 / 6**0.5) ** 0.5 if ".conv" in name else 1.0
            )
            norms = layer.weight.flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, torch.full_like(norms, norm))
            assert not layer.bias.any()


@pytest.mark.parametrize("bf16", [False, True])
def test_channels_last_without_copy(bf16):
    """An NHWC batch permuted to NCHW is channels_last without a copy, and so is all that the encoder makes of it."""
    obs = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    nchw = obs.permute(0, 3, 1, 2)
    assert nchw.data_ptr() == obs.data_ptr() and nchw.is_contiguous(memory_format=torch.channels_last)
    encoder, seen = ppg.ImpalaEncoder((64, 64, 3)), []
    for layer in encoder.stacks.modules():
        layer.register_forward_hook(lambda layer, inputs, output: seen.extend([*inputs, output]))
    encoder(obs, bf16)
    weights = [p for p in encoder.stacks.parameters() if p.dim() == 4]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen + weights)
    assert {x.dtype for x in seen if x.shape[1] > 3} == {torch.bfloat16 if bf16 else torch.float32}


HEADS = ("policy_head", "aux_value_head", "value_head")


@pytest.mark.parametrize(
    "phase, arch, detach_value, reaching",
    [
        ("policy", "dual", "policy", "policy_head"),
        ("policy", "shared", "policy", "policy_head"),
        ("policy", "shared", "always", "policy_head"),
        ("policy", "shared", "never", "policy_head value_head"),
        ("auxiliary", "dual", "policy", "policy_head aux_value_head"),
        ("auxiliary", "shared", "policy", "policy_head aux_value_head value_head"),
        ("auxiliary", "shared", "always", "policy_head aux_value_head"),
        ("auxiliary", "shared", "never", "policy_head aux_value_head value_head"),
    ],
)
def test_which_head_trains_the_policy_encoder(phase, arch, detach_value, reaching):
    """Only the losses of these heads reach the policy encoder; the true value head alone reaches a value encoder."""
    args, reached = ppg.parse_args(["--beta-clone", "1"]), {"policy_encoder": [], "value_encoder": []}
    args.detach_value = detach_value
    obs, logits = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8), torch.randn(4, 5)
    actions, x = torch.tensor([0, 1, 2, 3]), torch.randn(4)
    for head in HEADS:
        agent = ppg.Agent((8, 8, 3), 5, arch)
        for other in set(HEADS) - {head}:
            nn.init.zeros_(getattr(agent, other).weight)  # then it sends nothing back to the features
        if phase == "policy":
            ppg.policy_phase_loss(agent, args, False, True, True, (obs, actions, x - 2, x, x))[0].backward()
        else:
            ppg.auxiliary_phase_loss(agent, args, False, (obs, logits, x))[0].backward()
        for encoder, heads in reached.items():
            if any(p.grad is not None and p.grad.any() for n, p in agent.named_parameters() if encoder in n):
                heads.append(head)
    assert reached["policy_encoder"] == reaching.split()
    assert reached["value_encoder"] == (["value_head"] if arch == "dual" else [])


@pytest.mark.parametrize(
    "arch, detach_value, losses, trained",
    [
        ("dual", "policy", "policy", "policy_encoder policy_head"),
        ("dual", "policy", "value", "value_encoder value_head"),
        ("dual", "policy", "policy value", "policy_encoder policy_head value_encoder value_head"),
        ("shared", "policy", "policy", "policy_encoder policy_head"),
        ("shared", "policy", "value", "value_head"),
        ("shared", "always", "value", "value_head"),
        ("shared", "never", "value", "policy_encoder value_head"),
        ("shared", "policy", "policy value", "policy_encoder policy_head value_head"),
    ],
)
def test_policy_phase_leaves_the_rest_without_gradient(arch, detach_value, losses, trained):
    """What no loss of this epoch trains keeps grad None, the auxiliary value head in every case."""
    args, agent = ppg.parse_args([]), ppg.Agent((8, 8, 3), 5, arch)
    args.detach_value = detach_value
    obs, x = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8), torch.randn(4)
    batch = obs, torch.tensor([0, 1, 2, 3]), x, x, x
    ppg.policy_phase_loss(agent, args, False, "policy" in losses, "value" in losses, batch)[0].backward()
    with_gradient = {name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None}
    assert with_gradient == set(trained.split())


@pytest.mark.parametrize("chunk_size", [1, 6, 10, 19])
def test_chunks_add_up_to_the_minibatch(chunk_size):
    """Processing a minibatch in chunks, a shorter last one too, gives the gradient and losses of the whole."""
    torch.manual_seed(0)
    args, agent = ppg.parse_args(["--arch", "shared"]), ppg.Agent((8, 8, 3), 5, "shared")
    batch = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8), torch.randn(20, 5), torch.randn(20)
    optimizer = torch.optim.SGD(agent.parameters(), lr=0)

    def gradients(size):
        loss_of = ppg.partial(ppg.auxiliary_phase_loss, agent, args, False)
        parts = ppg.train_minibatch(optimizer, loss_of, batch, size)
        return parts, [p.grad.clone() for p in agent.parameters()]

    loss, parts = ppg.auxiliary_phase_loss(agent, args, False, batch)
    loss.backward()
    expected = parts, [p.grad.clone() for p in agent.parameters()]
    for size in (chunk_size, 20):  # each with the gradients before it left over, which must not count
        torch.testing.assert_close(gradients(size), expected, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- environments


def procgen(env_id="chaser", num_envs=4, mode="easy", num_levels=0, start_level=0, seed=1, num_threads=2):
    return ppg.ProcgenVectorEnv(env_id, num_envs, mode, num_levels, start_level, seed, num_threads)


def test_vector_interface():
    """Spaces and five values as gym 0.26 has them; terminated is Procgen's `first`, a reward that of the step made."""
    envs = procgen("dodgeball", 8)
    plain = ppg.ProcgenGym3Env(
        num=8, env_name="dodgeball", distribution_mode="easy", num_levels=0, start_level=0, rand_seed=1, num_threads=1
    )
    assert envs.single_observation_space == gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert envs.single_action_space == gym.spaces.Discrete(15) and envs.num_envs == 8
    obs, info = envs.reset()
    assert obs in envs.observation_space and info == {}
    np.testing.assert_array_equal(obs, plain.observe()[1]["rgb"])
    ended = rewarded = 0
    for actions in np.random.default_rng(0).integers(0, 15, (200, 8)):
        envs.step_async(actions)
        obs, rewards, terminated, truncated, info = envs.step_wait()
        plain.act(actions)
        expected_rewards, expected_obs, first = plain.observe()
        np.testing.assert_array_equal(obs, expected_obs["rgb"])
        np.testing.assert_array_equal(rewards, expected_rewards)
        np.testing.assert_array_equal(terminated, first)
        assert obs in envs.observation_space and rewards.shape == (8,) and info == {}
        assert terminated.dtype == truncated.dtype == bool and not truncated.any()
        ended, rewarded = ended + terminated.sum(), rewarded + (rewards != 0).sum()
    assert ended and rewarded


def test_reset_amid_an_episode():
    """A second reset ends every episode and gives the first observations of new ones."""
    envs = procgen()
    first, _ = envs.reset()
    for _ in range(5):
        envs.step(np.full(4, 7))
    again, _ = envs.reset()
    assert envs.procgen.observe()[2].all() and all((a != b).any() for a, b in zip(first, again))


@pytest.mark.parametrize("game", ppg.GAMES)
def test_every_game_in_every_mode(game):
    """Each of the 16 games makes and steps in each mode that it has."""
    assert len(ppg.GAMES) == 16
    for mode in ("easy", "hard", *ppg.GAMES[game][2]):
        envs = procgen(game, 2, mode)
        frames = [envs.reset()[0].copy()] + [envs.step(np.array([7, action]))[0].copy() for action in range(8)]
        assert np.ptp(frames[0]) > 0 and any((frame != frames[0]).any() for frame in frames)
        envs.close()


def test_levels_and_seed():
    """One level looks the same in all environments, another start level differs, and so does another seed."""

    def first(**options):
        return procgen(**options).reset()[0].copy()

    one, other = first(num_levels=1, start_level=3), first(num_levels=1, start_level=4)
    assert (one == one[0]).all() and (other == other[0]).all() and (one != other).any()
    assert (first() != first()[0]).any() and (first(seed=1) != first(seed=2)).any()
    np.testing.assert_array_equal(first(seed=2), first(seed=2))


def test_threads_do_not_matter():
    """Observations, rewards and ends do not depend on the number of Procgen's threads."""
    one, four = procgen(num_envs=6, num_threads=1), procgen(num_envs=6, num_threads=4)
    one.reset(), four.reset()
    for actions in np.random.default_rng(0).integers(0, 15, (50, 6)):
        for a, b in zip(one.step(actions)[:3], four.step(actions)[:3]):
            np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["shared", "dual"])
def test_first_kl_is_zero(tmp_path, arch, precision):
    """Before the first auxiliary step pi is pi_old: KL is exactly 0, in two chunks and any precision."""
    flags = f"--arch {arch} --precision {precision} --num-steps 128 --total-timesteps 512 --num-aux-minibatches 1"
    tiny(tmp_path, flags)  # 1 auxiliary epoch of 1 minibatch
    assert scalars(tmp_path)["losses/aux/kl_loss"] == {512: 0.0}


def test_beta_clone_keeps_the_policy(tmp_path):
    """A large beta_clone holds the policy in the auxiliary phase, where a zero one lets it move."""
    kl = {}
    for beta in (0, 100):
        tiny(tmp_path / str(beta), f"--beta-clone {beta} --aux-learning-rate 1e-4 --e-aux 12 --total-timesteps 32")
        kl[beta] = scalars(tmp_path / str(beta))["losses/aux/kl_loss"][32]
    assert kl[0] > 10 * kl[100]


def test_every_segment_once_an_epoch(tmp_path, record):
    """Policy epochs take each environment once, auxiliary epochs each segment that the phase's rollouts saw."""
    tiny(tmp_path, "--n-pi 2 --e-pi 2 --e-v 2 --e-aux 3")
    policy, auxiliary = record[:8], record[8:]  # 2 rollouts x 2 epochs x 2 minibatches; 3 epochs x 4 minibatches
    for calls, epochs, segments in (policy, 4, 4), (auxiliary, 3, 8):
        rows = np.reshape([call["rows"] for call in calls], (epochs, segments))
        assert (np.sort(rows) == range(segments)).all() and (rows != rows[0]).any()
    for seen in ("obs", "targets"):
        assert torch.equal(auxiliary[0][seen], torch.cat([policy[0][seen], policy[4][seen]]))
    assert len({call["data"][0].untyped_storage().data_ptr() for call in record}) == 1  # rollouts fill the phase buffer


def test_advantages_and_optimizers(tmp_path, record):
    """Advantages are normalised over the rollout; each of the phases has an Adam of its own with its own step size."""
    tiny(tmp_path, "--learning-rate 2e-4 --aux-learning-rate 3e-4")
    advantages = [call["data"][3] for call in record if len(call["data"]) == 5]
    assert len(advantages) == 4
    for x in advantages:
        assert (x.mean().item(), x.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-5)
    optimizers = [call["optimizer"] for call in record]
    policy, auxiliary = optimizers[0], optimizers[2]
    assert optimizers == [policy, policy, auxiliary, auxiliary] * 2 and policy is not auxiliary
    assert [x.param_groups[0]["lr"] for x in (policy, auxiliary)] == [2e-4, 3e-4]


def test_without_auxiliary_phase_one_rollout_is_kept(tmp_path, record, capsys):
    """With --e-aux 0 the buffer holds one rollout, whatever --n-pi and --num-aux-minibatches are, and the first line
    says that there is no auxiliary phase."""
    tiny(tmp_path, "--n-pi 2 --e-aux 0 --num-aux-minibatches 16")
    assert "no auxiliary phase" in capsys.readouterr().out.splitlines()[0]
    assert {call["data"][0].untyped_storage().nbytes() for call in record} == {32 * 64 * 64 * 3}


@pytest.mark.parametrize("e_pi, e_v", [(1, 3), (3, 1)])
def test_policy_and_value_epochs_apart(tmp_path, record, e_pi, e_v):
    """Each network takes steps for its own epochs only, and stays as it is, bit for bit, in the epochs of the other."""
    agent = tiny(tmp_path, f"--arch dual --e-pi {e_pi} --e-v {e_v} --e-aux 0 --total-timesteps 32")
    for i, (name, parameter) in enumerate(agent.named_parameters()):
        epochs = e_v if name.startswith("value_") else 0 if name.startswith("aux") else e_pi
        history = [call["weights"][i] for call in record]
        moves = [not torch.equal(a, b) for a, b in pairwise(history)]
        assert moves == [True] * (2 * epochs - 1) + [False] * (6 - max(2 * epochs, 1)), name
        steps = record[0]["optimizer"].state[parameter].get("step", 0) if epochs else 0
        assert steps == 2 * epochs


LEARN = (
    "--num-envs 16 --num-steps 16 --num-minibatches 4 --num-aux-minibatches 4 --n-pi 4 --e-aux 1 --gamma 0.9"
    " --learning-rate 1e-3 --aux-learning-rate 1e-3 --total-timesteps 2560 --device cpu"
)


@pytest.mark.parametrize(
    "variant", ["--arch shared", "--arch dual", "--arch shared --detach-value never --e-pi 3 --e-v 3 --e-aux 0"]
)
def test_learning(tmp_path, monkeypatch, variant):
    """PPG with one network, with two, and PPO come from chance to 90 % of the best return in another environment."""
    envs = use(monkeypatch, Quadrants(16))
    ppg.train(ppg.parse_args([*LEARN.split(), *variant.split(), "--run-dir", str(tmp_path)]))
    assert np.mean(envs.returns[:50]) < 0.5 * envs.best_return
    assert np.mean(envs.returns[-100:]) >= 0.9 * envs.best_return


# ----------------------------------------------------------------------------------------------------------- whole runs

# What the user sees change: the weights in the end, the steps that are logged, the first line, or the path.
EFFECTS = {
    "weights": "--env-id starpilot --distribution-mode hard --num-levels 1 --start-level 7 --seed 2"
    " --detach-value never --learning-rate 1e-3 --gamma 0.5 --gae-lambda 0.5 --reward-norm-gamma 0.5"
    " --num-minibatches 4 --clip-coef 1e-4 --kl-coef 1 --ent-coef 0.1 --e-pi 2 --e-v 2 --e-aux 2 --beta-clone 5"
    " --num-aux-minibatches 4 --aux-learning-rate 1e-3 --precision bf16",
    "steps": "--num-envs 2 --num-steps 4 --total-timesteps 96 --n-pi 2",
    "header": "--arch dual --device cuda",
    "path": "--exp-name mine --run-dir elsewhere",
    "files": "--checkpoint-every 0",
}
EFFECTS = [(flag, value, what) for what, flags in EFFECTS.items() for flag, value in zip(*[iter(flags.split())] * 2)]


def test_every_flag_has_an_effect_listed(base):
    """The table above names every flag of the script but two that have tests of their own below; without --run-dir the
    path tells game, name and seed."""
    assert {flag for flag, _, _ in EFFECTS} == FLAGS - {"--resume", "--compile"}
    assert base["path"] == "runs/chaser__ppg_procgen__1"


@pytest.mark.parametrize("flag, value, what", EFFECTS)
def test_every_flag_changes_something(tmp_path, base, flag, value, what):
    """Every flag changes what the table says, alone; --start-level does so with --num-levels."""
    context = "--num-levels 1" if flag == "--start-level" else ""
    (tmp_path / "with").mkdir(), (tmp_path / "without").mkdir()
    without = observe(tmp_path / "without", context) if context else base
    changed = observe(tmp_path / "with", f"{context} {flag} {value}")[what]
    assert changed and not (same_weights(changed, without[what]) if what == "weights" else changed == without[what])


def test_one_seed_one_result(tmp_path, base):
    """Two runs with one seed end with bit-identical parameters; another seed is a row of the table above."""
    assert same_weights(observe(tmp_path)["weights"], base["weights"])


def test_seed_reaches_torch(tmp_path, monkeypatch):
    """The seed is torch's too: with equal environments, two seeds end with different parameters."""
    weights = []
    for seed in 1, 1, 2:
        use(monkeypatch, Quadrants(4))
        weights.append(tiny(tmp_path / str(len(weights)), f"--seed {seed}").state_dict())
    assert same_weights(weights[0], weights[1]) and not same_weights(weights[0], weights[2])


def test_without_bf16_hardware_auto_is_fp32(tmp_path, monkeypatch):
    """Where the CPU has no bf16, auto is fp32, bit for bit, and the header says so."""
    monkeypatch.setattr(ppg, "has_bf16", lambda device: False)
    (tmp_path / "auto").mkdir(), (tmp_path / "fp32").mkdir()
    auto, fp32 = observe(tmp_path / "auto"), observe(tmp_path / "fp32", "--precision fp32")
    assert same_weights(auto["weights"], fp32["weights"])
    assert "auxiliary phase fp32" in auto["header"] and "no bf16" in auto["header"]


CHARTS = "charts/SPS charts/learning_rate"
EPISODES = "charts/episodic_return charts/episodic_length charts/normalized_return"
LOSSES = "losses/policy_loss losses/value_loss losses/entropy losses/approx_kl losses/explained_variance"
AUXILIARY = "losses/aux/kl_loss losses/aux/aux_value_loss losses/aux/real_value_loss time/auxiliary_phase"
TIMES = "time/rollout time/policy_phase"


@pytest.mark.parametrize("flags, clipfrac", [("--clip-coef 0.2", "losses/clipfrac"), ("--clip-coef 0 --kl-coef 1", "")])
def test_tensorboard(tmp_path, monkeypatch, flags, clipfrac):
    """The tags of the design at the global steps: each rollout, each complete phase, and where an episode ended."""
    envs = use(monkeypatch, Quadrants(4))  # episodes of 4 steps in rollouts of 3: none ends in the first
    tiny(tmp_path, f"--env-id starpilot --num-steps 3 --n-pi 2 --total-timesteps 55 {flags}")
    points = {tag: list(values) for tag, values in scalars(tmp_path).items()}
    rollouts = [12, 24, 36, 48, 60]  # 55 rounded up
    assert points == {
        **dict.fromkeys(f"{CHARTS} {LOSSES} {TIMES} {clipfrac}".split(), rollouts),
        **dict.fromkeys(EPISODES.split(), rollouts[1:4]),
        **dict.fromkeys(AUXILIARY.split(), rollouts[1::2]),  # the last phase is not complete
    }
    returns = np.array(envs.returns).reshape(3, 4).mean(1)
    logged = {tag: np.array(list(scalars(tmp_path)[tag].values())) for tag in EPISODES.split()}
    np.testing.assert_allclose(logged["charts/episodic_return"], returns, rtol=1e-6)
    np.testing.assert_allclose(logged["charts/normalized_return"], (returns - 2.5) / 61.5, rtol=1e-6)
    assert (logged["charts/episodic_length"] == 4).all()
    text = events(tmp_path).Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"|{flag[2:].replace('-', '_')}|" in text for flag in FLAGS) and "|total_timesteps|55|" in text


def test_time_left(monkeypatch, capsys):
    """`left` goes by whole phases, auxiliary phase included: what the last took, less what this one has taken. In an
    auxiliary phase it goes by epochs, where pi_old's forward pass counts as a third of one."""
    clock = iter([0, 30, 30, 60, 80, 90, 90, 130]).__next__  # start; line, twice; phase ends; line; lap, twice; line
    monkeypatch.setattr(ppg.time, "perf_counter", clock)
    progress, episodes = ppg.Progress(0, 300, 100, True), ppg.EpisodeStatistics(1)
    losses = {"losses/approx_kl": 0, "losses/explained_variance": 0}
    progress.print_iteration(100, losses, episodes)
    progress.end_phase(100)  # after 60 s: the next two take 120 s
    progress.print_iteration(200, losses, episodes)  # 20 s later
    progress.lap("policy_phase")
    progress.print_auxiliary(2, 0, 5, 5, torch.zeros(3, 3))  # 40 s later: 1/3 + 1 epochs are over, 2 are left
    assert [line.rpartition("left ")[2] for line in capsys.readouterr().out.splitlines()] == ["?", "1m40s", "1m00s"]


@pytest.mark.parametrize("flags, warning", [("--n-pi 3", "--n-pi 2"), ("--n-pi 2", ""), ("--n-pi 3 --e-aux 0", "")])
def test_warning_below_one_phase(tmp_path, capsys, flags, warning):
    """Fewer rollouts than N_pi: one warning, with an --n-pi that brings an auxiliary phase; without E_aux none."""
    tiny(tmp_path, flags)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(warning) and all(warning in line and "warning" in line for line in lines)
    assert ("losses/aux/kl_loss" in scalars(tmp_path)) == (flags == "--n-pi 2")


@pytest.mark.parametrize("arch", ["shared", "dual"])
def test_script(tmp_path, arch):
    """The script trains through phases on the real game; stderr stays empty, and its agent.pt loads and acts."""
    flags = f"{TINY} --env-id starpilot --arch {arch} --run-dir {tmp_path}".split()
    status, output, errors = python(SCRIPT, *flags)
    assert (status, errors) == (0, [])
    parameters = "626,513" if arch == "shared" else "1,248,657"
    parts = (
        "starpilot easy",
        "all levels",
        arch,
        parameters,
        "4 environments x 8 steps",
        "cpu",
        "fp32",
        "32 steps per phase",
    )
    assert all(part in output[0] for part in (*parts, "phase buffer"))
    assert sum(line.startswith("step ") for line in output) == 2 and "step 64/64 100.0%" in "".join(output)
    assert sum("auxiliary phase 2, epoch 1/1 100%" in line for line in output) == 1
    assert "steps/s" in output[-1] and str(tmp_path / "agent.pt") in output[-1]
    agent, args = ppg.load_agent(tmp_path / "agent.pt")
    actions, _, _ = ppg.act(agent, torch.from_numpy(ppg.make_envs(args).reset()[0]))
    assert args.arch == arch and actions.shape == (4,) and (0 <= actions).all() and (actions < 15).all()


def test_agent_file_is_the_trained_agent(tmp_path):
    """agent.pt holds the parameters that training ended with, and the flags."""
    agent, (loaded, args) = tiny(tmp_path, "--arch dual --gamma 0.9"), ppg.load_agent(tmp_path / "agent.pt")
    assert same_weights(agent.state_dict(), loaded.state_dict()) and args.gamma == 0.9 and args.env_id == "chaser"


class Nan(Quadrants):
    def step_wait(self):
        obs, rewards, *rest = super().step_wait()
        return obs, rewards * np.nan, *rest


@pytest.mark.parametrize(
    "flags, envs, words",
    [
        ("--learning-rate 1e30", None, "losses/policy_loss policy phase step 32"),
        ("--aux-learning-rate 1e30", None, "losses/aux/kl_loss auxiliary phase step 32"),
        ("", Nan(4), "return policy phase step 32"),
    ],
)
def test_non_finite_loss_stops_the_run(tmp_path, monkeypatch, flags, envs, words):
    """A loss that is no number ends the run with a message that names it and the step, and agent.pt is not written."""
    if envs:
        use(monkeypatch, envs)
    with pytest.raises(SystemExit, match=".*".join(words.split())):
        tiny(tmp_path, flags)
    assert not (tmp_path / "agent.pt").exists()


# ------------------------------------------------------------------------------------------------------------ bad input

BAD = [
    ("--env-id starpliot", "did you mean starpilot"),
    ("--env-id bigfish --distribution-mode memory", "easy, hard"),
    ("--distribution-mode medium", "easy, hard, extreme"),
    *((f"--{name} 0", "1 or more") for name in ("num-envs", "num-steps", "total-timesteps", "n-pi", "e-pi", "e-v")),
    ("--num-envs -4", "1 or more"),
    *((f"--num-{name}minibatches {n}", f"{n}: must") for name in ("", "aux-") for n in (-2, 0)),
    *((f"--num-{name}minibatches 3", "1, 2") for name in ("", "aux-")),
    *((f"--{name} -1", "between 0 and") for name in ("num-levels", "seed", "e-aux")),
    *((f"--gamma {gamma}", "more than 0 and at most 1") for gamma in ("0", "1.001", "-1", "nan")),
    ("--reward-norm-gamma 0", "more than 0 and at most 1"),
    ("--gae-lambda 1.5", "between 0 and 1"),
    *((f"--{name} 0", "more than 0") for name in ("learning-rate", "aux-learning-rate")),
    *((f"--{name} -0.1", "0 or more") for name in ("clip-coef", "kl-coef", "ent-coef", "beta-clone")),
    ("--arch dual --detach-value policy", "--arch shared"),
    ("--detach-value both", "always"),
    ("--start-level 5", "--num-levels"),
    ("--env-id maze --distribution-mode exploration --num-levels 5", "its own level"),
    ("--total-timesteps 31", "32"),
    ("--num-steps 2.5", "--num-steps"),
    ("--num-envs four", "--num-envs"),
    ("--learning-rate fast", "--learning-rate"),
    ("--frobnicate 1", "--frobnicate"),
    ("--total 64", "--total"),
    ("--device cuda", "--device cpu"),
    ("--run-dir {tmp}/file/below", "{tmp}/file/below"),
    ("--run-dir {tmp}/run", "another --run-dir"),
    ("--n-pi 100_000_000 --total-timesteps 3.2e9", "is the largest that fits"),
    ("--num-steps 1_000_000_000 --total-timesteps 4e9", "fewer --num-envs or --num-steps"),
]


@pytest.fixture
def places(tmp_path):
    """A regular file, and two run directories that are taken."""
    for path in "file", "run/agent.pt":
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


@pytest.mark.parametrize("flags, hint", BAD)
def test_bad_input(places, monkeypatch, capsys, flags, hint):
    """Bad input ends with status 2 and one line on stderr, which says what would be right; stdout stays empty."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(places)
    with pytest.raises(SystemExit) as stopped:
        ppg.train(ppg.parse_args([*TINY.split(), *flags.format(tmp=places).split()]))
    output, errors = capsys.readouterr()
    assert stopped.value.code == 2 and output == "" and errors.count("\n") == 1
    assert hint.format(tmp=places) in errors


@pytest.mark.parametrize(
    "flags, hint", [BAD[0], ("--device cuda", "--device cpu"), ("--run-dir {tmp}/run", "already holds a run")]
)
def test_bad_input_of_the_script(places, flags, hint):
    """So it is for the script as a process, which keeps gym's notices and tracebacks to itself."""
    flags = [*TINY.split(), *flags.format(tmp=places).split()]
    status, output, errors = python(SCRIPT, *flags, CUDA_VISIBLE_DEVICES="")
    assert (status, output, len(errors)) == (2, [], 1) and hint in errors[0]


@pytest.mark.parametrize(
    "other",
    ["sys.version_info = (3, 13, 0)", "sys.version_info = (3, 9, 0)", "platform.machine = lambda: 'arm64'"]
    + ["sys.platform = 'darwin'"],
)
def test_other_systems(other):
    """Another Python or machine gets one line, which names what Procgen is built for."""
    imports = "import argparse, difflib, pathlib, platform, runpy, sys"
    start = f"{imports}; {other}; runpy.run_path('{SCRIPT}', run_name='__main__')"
    status, output, errors = python("-c", start, "--env-id", "none")
    assert (status, output, len(errors)) == (2, [], 1)
    assert "Python 3.10, 3.11 and 3.12 on Linux x86-64" in errors[0]


def test_too_large_a_phase_buffer(tmp_path, monkeypatch, capsys):
    """The error names the bytes needed, the bytes free, and the largest --n-pi that fits, which does."""
    monkeypatch.setattr(ppg, "free_memory", lambda: 1_500_000_000 + 5 * 32 * 64 * 64 * 3 + 1)
    with pytest.raises(SystemExit):
        tiny(tmp_path / "a", "--n-pi 6 --total-timesteps 192")
    error = capsys.readouterr().err
    assert f"{6 * 32 * 64 * 64 * 3:,}" in error and f"{ppg.free_memory():,}" in error and "--n-pi 5 " in error
    tiny(tmp_path / "b", "--n-pi 5 --total-timesteps 160")


V1, V2 = "4:memory:/box/job\n3:cpu:/other\n", "0::/box/job\n"
MEMORY, LIMITED = "sys/fs/cgroup/memory", {"memory.limit_in_bytes": "700", "memory.usage_in_bytes": "350"}


@pytest.mark.parametrize(
    "cgroup, files, free",
    [
        (V2, {}, 1024_000),
        (V2, {"sys/fs/cgroup/box/job": {"memory.max": "700", "memory.current": "350"}}, 400),
        (V2, {"sys/fs/cgroup/box/job": {"memory.max": "max", "memory.current": "350"}}, 1024_000),
        (V2, {"sys/fs/cgroup/box": {"memory.max": "900", "memory.current": "350"}}, 600),
        (V2, {"sys/fs/cgroup": {"memory.max": "950", "memory.current": "350"}}, 650),
        (V2, {"sys/fs/cgroup/box": {"memory.max": "9999999", "memory.current": "0"}}, 1024_000),
        (V1, {f"{MEMORY}/box/job": LIMITED}, 400),
        (V1, {f"{MEMORY}/box": LIMITED}, 400),
        (V1, {MEMORY: LIMITED}, 400),
        (V1, {"sys/fs/cgroup/other": LIMITED, f"{MEMORY}/other": LIMITED}, 1024_000),
    ],
)
def test_free_memory(tmp_path, cgroup, files, free):
    """The lesser of MemAvailable and what a cgroup or its ancestor leaves below the limit, v1 or v2; files that were
    read (inactive_file) count as free."""
    files = {
        "proc": {"meminfo": "MemTotal: 9000 kB\nMemAvailable: 1000 kB\n"},
        "proc/self": {"cgroup": cgroup},
        **files,
    }
    for folder, contents in files.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "memory.stat").write_text("inactive_file 50\ntotal_inactive_file 50\nrss 9\n")
        for name, text in contents.items():
            (tmp_path / folder / name).write_text(text)
    assert ppg.free_memory(tmp_path) == free


# A phase is two rollouts of 16 steps in all. Chaser rewards a random policy within a few steps.
SMALL = (
    "--env-id chaser --arch shared --num-envs 2 --num-steps 8 --num-minibatches 2 --n-pi 2 --e-aux 1"
    " --num-aux-minibatches 2 --device cpu"
)
PHASE = 32


def train(flags):
    """A run, or more of one, in this process."""
    args = ppg.parse_args(shlex.split(flags))
    while list(Path(args.run_dir).glob(f"events.*.{int(time.time())}.*")):
        time.sleep(0.05)  # TensorBoard reads the event files of a directory in the order of the seconds in their names
    return ppg.train(args)


def stopped(flags, capsys):
    """A run in this process -> its exit status, its lines on stderr."""
    status, message = 0, ""
    try:
        train(flags)
    except SystemExit as stop:  # a message instead of a status is printed by Python, and the status is 1
        status, message = (stop.code, "") if isinstance(stop.code, int) else (1, stop.code)
    return status, (capsys.readouterr().err + message).splitlines()


def assert_refused(flags, words, capsys):
    """A run in this process ends with exit status 2 and one line on stderr with these words."""
    status, errors = stopped(flags, capsys)
    assert status == 2 and len(errors) == 1 and words in errors[0], errors


def start(flags, **options):
    """The script as a process of its own."""
    command = [sys.executable, SCRIPT, *shlex.split(flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=SCRIPT.parent, **pipes, **options)


def read_until(process, *beginnings):
    """Read a process's stdout up to lines that begin so, one after the other."""
    for beginning in beginnings:
        while not (line := process.stdout.readline()).startswith(beginning):
            assert line, f"no line {beginning!r}; stderr: {process.stderr.read()}"


def finish(process):
    """Wait for a process -> its exit status, its lines on stderr that are not empty."""
    errors = process.communicate(timeout=120)[1]
    return process.returncode, [line for line in errors.splitlines() if line]


def flat(value, path="checkpoint"):
    """Nested containers -> {path: value}, tensors as their type, shape and hash."""
    if isinstance(value, torch.Tensor):
        return {path: (value.dtype, tuple(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest())}
    if not isinstance(value, (dict, list, tuple)):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for key, part in items for name, leaf in flat(part, f"{path}.{key}").items()}


def content(run_dir):
    """All that two equal runs have in common, bit by bit: the checkpoint, the weights and the scalars."""
    data, problems = ppg.load_checkpoint(run_dir)
    assert not problems
    for name in ("run_dir", "total_timesteps", "checkpoint_every"):
        del data["args"][name]
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/SPS" and not tag.startswith("time/")]
    scalars = {tag: [(event.step, event.value.hex()) for event in events.Scalars(tag)] for tag in tags}
    return flat(data) | flat(ppg.load_agent(Path(run_dir, "agent.pt"))[0].state_dict(), "agent") | scalars


def position(path):
    return torch.load(path, weights_only=True)["position"][:2]


def files(run_dir):
    """The names of a run directory's files, the content of its checkpoints and its weights."""
    return {file.name: file.read_bytes() for file in Path(run_dir).glob("*.p*")}


def edit(path, change):
    data = torch.load(path, weights_only=True)
    change(data)
    ppg.save(path, data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The content of an uninterrupted run of three phases."""
    run_dir = tmp_path_factory.mktemp("whole")
    train(f"{SMALL} --run-dir {run_dir} --total-timesteps {3 * PHASE}")
    return content(run_dir)


@pytest.fixture(scope="module")
def two_phases(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two_phases")
    train(f"{SMALL} --run-dir {run_dir} --total-timesteps {2 * PHASE}")
    return run_dir


@pytest.fixture
def run_dir(two_phases, tmp_path):
    """A run of two phases, of the test's own."""
    return shutil.copytree(two_phases, tmp_path / "run")


# --------------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize(
    "flags, first, last",
    [
        *[(f"--env-id {game}", PHASE, 2 * PHASE) for game in ppg.GAMES],
        ("--arch dual", PHASE, 2 * PHASE),
        ("--precision fp32 --e-pi 2 --e-v 1", PHASE, 2 * PHASE),
        ("", PHASE + 16, 3 * PHASE + 16),
        ("", 16, 2 * PHASE),
    ],
)
def test_resume_is_exact(tmp_path, flags, first, last):
    """A run that ended at a phase boundary, or inside a phase, and is extended ends as if it had run in one go."""
    train(f"{SMALL} {flags} --run-dir {tmp_path / 'one_go'} --total-timesteps {last}")
    train(f"{SMALL} {flags} --run-dir {tmp_path / 'extended'} --total-timesteps {first}")
    train(f"--resume {tmp_path / 'extended'} --total-timesteps {last}")
    assert content(tmp_path / "extended") == content(tmp_path / "one_go")


def test_killed_at_any_moment(tmp_path):
    """Killed by SIGKILL at 12 random moments, six of them meant to be while a checkpoint is written, and resumed each
    time, the script ends as if left alone; at each moment a checkpoint is complete."""
    flags, run_dir, rng = f"{SMALL} --num-steps 4 --total-timesteps {16 * 16}", tmp_path / "killed", random.Random(1)
    train(f"{flags} --run-dir {tmp_path / 'left_alone'}")
    partial_file, while_writing, positions = run_dir / "checkpoint.partial", 0, []
    for kill in range(12):
        started = time.time_ns()

        def is_writing(since=started):
            with suppress(FileNotFoundError):  # what is left from an earlier kill is older
                return partial_file.stat().st_mtime_ns > since

        process = start(f"{flags} --run-dir {run_dir}" if kill == 0 else f"--resume {run_dir}")
        lines = rng.randrange(4) if kill else 0  # the first kill comes before the first phase boundary
        read_until(process, "chaser", "step", *[""] * lines)
        if kill % 2:
            while process.poll() is None and not is_writing():
                time.sleep(0.0005)
        else:
            time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        while_writing += bool(is_writing())
        positions.append(ppg.load_checkpoint(run_dir)[0]["position"][1])
    assert while_writing >= 3 and positions[0] == 0 and positions == sorted(positions)
    train(f"--resume {run_dir}")
    assert content(run_dir) == content(tmp_path / "left_alone")


def test_killed_before_the_first_checkpoint(tmp_path, whole):
    """What a kill before the first checkpoint was complete leaves behind does not stop the same command from starting
    anew."""
    (tmp_path / "checkpoint.partial").write_bytes(b"unfinished")
    ppg.SummaryWriter(tmp_path).close()
    train(f"{SMALL} --run-dir {tmp_path} --total-timesteps {3 * PHASE}")
    assert content(tmp_path) == whole


@pytest.mark.parametrize(
    "number, status, flags",
    [(signal.SIGINT, 130, ""), (signal.SIGTERM, 143, ""), (signal.SIGINT, 130, "--checkpoint-every 0")],
)
def test_signals(tmp_path, whole, number, status, flags):
    """Ctrl-C and SIGTERM end a run with 130 and 143 and one line that says up to which step it is saved, with a command
    that really continues it, or that nothing is saved."""
    run_dir = tmp_path / "a run"
    process = start(f"{SMALL} {flags} --total-timesteps {3 * PHASE} --run-dir '{run_dir}'")
    read_until(process, "step", "step", "step")
    process.send_signal(number)
    ended, errors = finish(process)
    assert ended == status and len(errors) == 1 and number.name in errors[0]
    if flags:
        assert "nothing to resume is saved" in errors[0] and not (run_dir / "checkpoint.pt").exists()
    else:
        assert f"saved up to step {position(run_dir / 'checkpoint.pt')[1]};" in errors[0]
        subprocess.run(errors[0].partition("continue with: ")[2], shell=True, check=True, cwd=SCRIPT.parent)
        assert content(run_dir) == whole


def test_one_process_per_run_directory(tmp_path, capsys):
    """While a process runs in a directory, no other may, fresh or with --resume; once it was killed, another may."""
    flags = f"{SMALL} --run-dir {tmp_path} --total-timesteps 1e9"
    process = start(flags)
    try:
        read_until(process, "step", "step", "step")
        for second in (flags, f"--resume {tmp_path}"):
            assert_refused(second, "another process", capsys)
    finally:
        process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    step = ppg.load_checkpoint(tmp_path)[0]["position"][1]
    train(f"--resume {tmp_path} --total-timesteps {step + PHASE}")
    assert position(tmp_path / "checkpoint.pt")[1] == step + PHASE


def test_memory_does_not_grow(tmp_path):
    """A run's resident memory after 100 rollouts is within 1 % of that after 10."""
    process = start(f"{SMALL} --total-timesteps {102 * 16} --run-dir {tmp_path}")
    kilobytes = []
    for rollouts in (10, 90):
        read_until(process, *["step"] * rollouts)
        kilobytes.append(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]))
    assert finish(process) == (0, [])
    assert kilobytes[1] == pytest.approx(kilobytes[0], rel=0.01)


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("file, limit", [("events.out", 700), ("agent.pt", 1_000_000), ("checkpoint.pt", 5_000_000)])
def test_full_disk(run_dir, whole, file, limit):
    """Where a file of the run cannot be written, the run ends with exit status 1 and one line that says why and how to
    go on; the checkpoint is as it was, and the run can be resumed exactly, over what was left unfinished."""
    before = files(run_dir)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    flags = f"--resume {run_dir} --total-timesteps {3 * PHASE}"
    status, errors = finish(start(flags, preexec_fn=full))
    assert status == 1 and len(errors) == 1
    assert re.search(f"File too large: saved up to step {2 * PHASE}; .* --resume {run_dir}$", errors[0])
    after = files(run_dir)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    agent = {"agent.pt"} if file == "checkpoint.pt" else set()  # written before the checkpoint
    assert changed - {"agent.partial", "checkpoint.partial"} == agent
    train(flags)
    assert content(run_dir) == whole


def flip(path, byte, bit=0):
    """Flip one bit of a file; twice is not at all."""
    with path.open("r+b") as file:
        file.seek(byte)
        flipped = file.read(1)[0] ^ 1 << bit
        file.seek(byte)
        file.write(bytes([flipped]))


DAMAGE = {
    "missing": os.remove,
    "empty": lambda path: os.truncate(path, 0),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "last byte missing": lambda path: os.truncate(path, path.stat().st_size - 1),
    "flipped bit in an early tensor": lambda path: flip(path, path.stat().st_size // 7),
    "flipped bit in a late tensor": lambda path: flip(path, path.stat().st_size * 6 // 7),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(run_dir, two_phases, capsys, damage):
    """From a damaged checkpoint, --resume goes back to checkpoint.previous.pt, names it in one line, and ends as if
    nothing had happened, with two good files; with both damaged it ends with exit status 2 and one line."""
    DAMAGE[damage](run_dir / "checkpoint.pt")
    status, errors = stopped(f"--resume {run_dir}", capsys)
    assert status == 0 and len(errors) == 1 and "checkpoint.previous.pt" in errors[0]
    assert content(run_dir) == content(two_phases)
    DAMAGE[damage](run_dir / "checkpoint.pt")
    assert ppg.load_checkpoint(run_dir)[0]["position"][:2] == (1, PHASE)
    DAMAGE[damage](run_dir / "checkpoint.previous.pt")
    assert_refused(f"--resume {run_dir}", "no checkpoint to load", capsys)


def test_flipped_bits(two_phases, tmp_path):
    """Any single flipped bit of a checkpoint is detected or changes nothing that is loaded: 200 at random of a real
    one, half of them outside the tensors, and every one of a small one."""
    path, rng = tmp_path / "checkpoint.pt", random.Random(1)

    def check(flips):
        undamaged = flat(ppg.load_checkpoint(tmp_path)[0])
        for byte, bit in flips:
            flip(path, byte, bit)
            loaded, problems = ppg.load_checkpoint(tmp_path)
            assert (loaded is None and problems) or flat(loaded) == undamaged, f"bit {bit} of byte {byte}"
            flip(path, byte, bit)

    size = os.path.getsize(shutil.copy(two_phases / "checkpoint.pt", path))
    ranges = (0, 8192), (size - 16384, size), (0, size), (0, size)
    check([(rng.randrange(*span), rng.randrange(8)) for span in ranges * 50])
    ppg.save(path, {"position": (1, torch.arange(9))})
    check([(byte, bit) for byte in range(os.path.getsize(path)) for bit in range(8)])


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_checkpoint_is_data(tmp_path):
    """Code in a checkpoint or in agent.pt is refused and not run."""
    for name in ("checkpoint.pt", "agent.pt"):
        ppg.save(tmp_path / name, {"args": {}, "agent": {}, "position": Malicious(tmp_path / "code_was_run")})
    data, problems = ppg.load_checkpoint(tmp_path)
    assert data is None and problems[0].startswith("checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError):
        ppg.load_agent(tmp_path / "agent.pt")
    assert not (tmp_path / "code_was_run").exists()


OTHER_VERSIONS = {
    "exp_name": lambda data: data["args"].pop("exp_name"),
    "another_flag": lambda data: data["args"].update(another_flag=1),
    "policy_head.weight": lambda data: data["learners"][0].update({"policy_head.weight": torch.zeros(9, 256)}),
    "another_head.bias": lambda data: data["learners"][0].update({"another_head.bias": torch.zeros(9)}),
    "value_head.bias": lambda data: data["learners"][0].pop("value_head.bias"),
}


@pytest.mark.parametrize("difference", OTHER_VERSIONS)
def test_checkpoint_of_another_version(run_dir, capsys, difference):
    """A checkpoint with other flags or parameters ends in exit status 2 and one line that names what differs."""
    edit(run_dir / "checkpoint.pt", OTHER_VERSIONS[difference])
    assert_refused(f"--resume {run_dir}", f"['{difference}']", capsys)


CONTRADICTIONS = (
    "--env-id maze|--distribution-mode hard|--num-levels 5|--num-envs 4|--num-steps 16|--seed 2|--arch dual"
    "|--detach-value never|--learning-rate 1e-4|--gamma 0.9|--num-minibatches 1|--clip-coef 0|--n-pi 1|--e-aux 0"
    "|--num-aux-minibatches 1|--precision fp32|--compile|--exp-name other|--run-dir elsewhere"
)


@pytest.mark.parametrize("flag", CONTRADICTIONS.split("|"))
def test_contradicting_flag(two_phases, capsys, flag):
    """A typed flag that contradicts the checkpoint ends in exit status 2 and one line that names it."""
    with pytest.raises(SystemExit) as stop:
        ppg.parse_args(shlex.split(f"--resume {two_phases} {flag}"))
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and f"{flag.split()[0]} " in errors[0]


def test_flags_that_may_be_given_again(two_phases):
    """With --resume, all flags may be given again with equal values, and the run's length and its checkpoints may
    change."""
    same = f"--resume {two_phases} --run-dir {two_phases} {SMALL} --learning-rate 0.0005"
    args = ppg.parse_args(shlex.split(f"{same} --total-timesteps 999 --checkpoint-every 3"))
    assert (args.total_timesteps, args.checkpoint_every, args.num_envs, args.n_pi) == (999, 3, 2, 2)
    args = ppg.parse_args(shlex.split(f"--resume {two_phases}"))
    assert (args.total_timesteps, args.checkpoint_every, args.env_id, args.n_pi) == (2 * PHASE, 1, "chaser", 2)


def test_moved_run(run_dir, two_phases, capsys):
    """A run directory may be moved and is resumed where it is; --run-dir cannot send the run elsewhere."""
    moved = run_dir.rename(run_dir.with_name("moved"))
    assert ppg.parse_args(shlex.split(f"--resume {moved} --run-dir {moved}")).run_dir == str(moved)
    assert_refused(f"--resume {moved} --run-dir {two_phases}", f"--run-dir {two_phases}", capsys)


def test_complete_run(run_dir, capsys):
    """Resuming a run that is complete says so and changes neither its checkpoints nor its weights."""
    before = files(run_dir)
    capsys.readouterr()
    train(f"--resume {run_dir}")
    out, err = capsys.readouterr()
    assert "complete" in out and err == "" and files(run_dir) == before


def test_part_of_a_phase(run_dir, capsys):
    """A run that adds less than a phase knows how long it takes, and does not give its rate as that of a phase."""
    train(f"--resume {run_dir} --total-timesteps {2 * PHASE + 16}")
    *_, line, summary = capsys.readouterr().out.splitlines()
    assert "left 0m00s" in line and "over part of a phase" in summary


def test_fresh_run_into_a_used_directory(two_phases, capsys):
    """A fresh run into a directory that holds one ends in exit status 2 and one line with the flag that resumes it."""
    assert_refused(f"{SMALL} --total-timesteps 32 --run-dir {two_phases}", f"--resume {two_phases}", capsys)


@pytest.mark.parametrize("phases, every, saved", [(4, 2, (4, 2)), (5, 2, (5, 4)), (5, 3, (5, 3))])
def test_checkpoint_every(tmp_path, phases, every, saved):
    """--checkpoint-every K writes a checkpoint at every K-th phase boundary and at the end."""
    total = f"--checkpoint-every {every} --total-timesteps {phases * 8}"
    train(f"{SMALL} --num-steps 4 --n-pi 1 --run-dir {tmp_path} {total}")
    assert tuple(position(tmp_path / f"checkpoint.{name}")[0] for name in ("pt", "previous.pt")) == saved


def test_no_checkpoints(tmp_path, capsys):
    """--checkpoint-every 0 writes none, and --resume then ends in exit status 2 and one line."""
    train(f"{SMALL} --run-dir {tmp_path} --checkpoint-every 0 --total-timesteps {PHASE}")
    assert list(files(tmp_path)) == ["agent.pt"]
    assert_refused(f"--resume {tmp_path}", "no checkpoint", capsys)


# ------------------------------------------------------------------------------------ other environments, other numbers


class Noise(gym.vector.VectorEnv):
    """Images of noise, always the same reward, no end of episodes; its state cannot be saved."""

    def __init__(self, args, reward=1.0):
        images = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
        super().__init__(args.num_envs, images, gym.spaces.Discrete(15))
        self.random, self.reward = np.random.default_rng(args.seed), reward

    def reset_wait(self, seed=None, options=None):
        return self.random.integers(0, 256, (self.num_envs, 16, 16, 3), dtype=np.uint8), {}

    def step_async(self, actions):
        pass

    def step_wait(self):
        going_on = np.zeros(self.num_envs, dtype=bool)
        return self.reset_wait()[0], np.full(self.num_envs, self.reward, np.float32), going_on, going_on, {}


def test_environment_that_cannot_be_saved(tmp_path, monkeypatch, capsys):
    """An environment without get_state can be resumed; one line on stderr says that its episodes begin anew, and they
    do: the sums of rewards and the lengths of those under way start at zero."""
    monkeypatch.setattr(ppg, "make_envs", Noise)
    train(f"{SMALL} --run-dir {tmp_path} --total-timesteps {PHASE}")
    capsys.readouterr()
    status, errors = stopped(f"--resume {tmp_path} --total-timesteps {2 * PHASE}", capsys)
    assert status == 0 and len(errors) == 1 and "begin anew" in errors[0]
    episodes, normalizer = ppg.load_checkpoint(tmp_path)[0]["statistics"]
    assert episodes["lengths"].tolist() == [16, 16] and episodes["returns"].tolist() == [16.0, 16.0]
    assert normalizer["discounted"].tolist() == pytest.approx([sum(0.99**t for t in range(16))] * 2)


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
def test_reward_that_is_not_finite(tmp_path, monkeypatch, capsys, reward):
    """A reward that is no number ends the run with exit status 1 and one line that names the return, the phase and the
    step; the checkpoint and the weights stay those of the phase before."""
    monkeypatch.setattr(ppg, "make_envs", Noise)
    train(f"{SMALL} --run-dir {tmp_path} --total-timesteps {PHASE}")
    before = files(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(ppg, "make_envs", partial(Noise, reward=reward))
    status, (_, error) = stopped(f"--resume {tmp_path} --total-timesteps {2 * PHASE}", capsys)
    assert status == 1 and "return (V^targ) is not finite in phase 2, policy phase, step 48" in error
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "optimizer, flags, last, problem",
    [
        (1, {}, 96, "losses/policy_loss is not finite in phase 3, policy phase, step 80"),
        (2, {}, 96, "losses/aux/kl_loss is not finite in phase 3, auxiliary phase, step 96"),
        (1, {"num_minibatches": 1, "e_aux": 0, "n_pi": 1}, 48, r"policy_encoder\S+ is not finite in phase 3, step 80"),
    ],
)
def test_huge_learning_rate(run_dir, capsys, optimizer, flags, last, problem):
    """A learning rate that is too large ends the run with exit status 1 and one line that names the loss or parameter
    that is no number, the phase and the step; the checkpoint and the weights stay those of the phase before."""

    def change(data):
        data["learners"][optimizer]["param_groups"][0]["lr"] = 1e39
        data["args"].update(flags)

    edit(run_dir / "checkpoint.pt", change)
    before = files(run_dir)
    status, errors = stopped(f"--resume {run_dir} --total-timesteps {last}", capsys)
    assert status == 1 and len(errors) == 1 and re.search(problem, errors[0])
    assert files(run_dir) == before


# -------------------------------------------------------------------------------------------------------- torch.compile


def test_compiled_steps_equal_eager_ones():
    """Compiled, the rollout's step and both phases' losses give the numbers and gradients of the eager ones."""
    torch.manual_seed(1)
    agent, size = ppg.Agent((16, 16, 3), 15, "shared"), 16
    obs, targets = torch.randint(0, 256, (size, 16, 16, 3), dtype=torch.uint8), torch.randn(size)
    policy_batch = obs, torch.randint(0, 15, (size,)), torch.randn(size) - 3, torch.randn(size), targets
    results, all_steps = [], []
    for flag in ("--no-compile", "--compile"):
        args = ppg.parse_args([flag])
        act, policy_step, auxiliary_step = all_steps[len(all_steps) :] = ppg.steps_for(args, torch.device("cpu"))
        actions, logprobs, values = act(agent, obs)
        expected = F.log_softmax(agent(obs)[0], -1).gather(-1, actions[:, None]).squeeze(-1)
        results.append([logprobs - expected, values])
        for loss, parts in (
            policy_step(agent, args, False, True, True, policy_batch),
            auxiliary_step(agent, args, False, (obs, torch.randn(size, 15, generator=torch.manual_seed(2)), targets)),
        ):
            agent.zero_grad()
            loss.backward()
            results[-1] += [loss, parts, *(p.grad for p in agent.parameters() if p.grad is not None)]
    assert len(set(all_steps)) == 6
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_no_compiler(tmp_path):
    """Where torch.compile finds no compiler, --compile says so in one line and the run goes to its end without."""
    missing = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = f"{SMALL} --compile --run-dir {tmp_path / 'run'} --total-timesteps {PHASE}"
    status, errors = finish(start(flags, env={**os.environ, **missing}))
    assert status == 0 and len(errors) == 1 and "torch.compile" in errors[0]
    assert position(tmp_path / "run" / "checkpoint.pt") == (1, PHASE)


# --------------------------------------------------------------------------------------------------------------- README


def code_blocks(*languages):
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", README.read_text(), re.DOTALL | re.MULTILINE)
    return [code for language, code in blocks if language in languages]


def test_readme_flags_and_commands(tmp_path, monkeypatch):
    """Every flag that the README names exists, and every command line of the script in it parses; what they resume is
    runs/demo. .ci/run runs the README's test command."""
    tiny(tmp_path / "runs/demo")
    monkeypatch.chdir(tmp_path)
    (tests,) = (block for block in code_blocks("bash") if "pytest" in block)
    assert tests.strip() in SCRIPT.with_name(".ci").joinpath("run").read_text()
    others = r"\b(pip|pytest|tensorboard|git|curl|uv|torchrun|venv)\b[^`\n;&|]*"
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(others, "", README.read_text())))
    assert named and named <= FLAGS
    commands = 0
    for block in code_blocks("sh", "bash", "console", ""):
        variables = re.findall(r"for (\w+) in (\w+)", block)  # one stands for its first value
        for line in re.findall(r"python\S* ppg_procgen\.py([^\n;&|#]*)", block.replace("\\\n", " ")):
            for name, value in variables:
                line = re.sub(rf"\$({name}\b|{{{name}}})", value, line)
            ppg.parse_args(shlex.split(line))
            commands += 1
    assert commands


def test_readme_python(tmp_path, capsys):
    """The README's Python lines load a run's agent.pt, play and print a return, as they stand but for the path."""
    tiny(tmp_path)
    capsys.readouterr()
    (snippet,) = (block for block in code_blocks("python") if "load_agent" in block)
    exec(re.sub(r"""(["'])[^"']*agent\.pt\1""", repr(str(tmp_path / "agent.pt")), snippet), {})  # noqa: S102
    assert re.search(r"\d", capsys.readouterr().out)
