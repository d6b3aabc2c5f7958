"""Phasic Policy Gradient (PPG) on Procgen, in one file.

    python ppg_procgen.py --env-id starpilot --arch shared          # one encoder: the faster variant
    python ppg_procgen.py --env-id starpilot                        # the paper's two networks
    python ppg_procgen.py --resume RUN_DIR                          # continue a run that was stopped

Paper: Cobbe, Hilton, Klimov, Schulman 2020, "Phasic Policy Gradient", arXiv:2009.04416. "Official" below is the
authors' code, github.com/openai/phasic-policy-gradient at commit 7295473. Its Algorithm 1 is `train`. In brief:

    for each phase:
        for N_pi iterations:                                                                  the policy phase
            roll out the policy; advantages A and value targets V^targ by GAE
            E_pi epochs on L^clip + beta_S * entropy  w.r.t. theta_pi
            E_V epochs on L^value = 1/2 (V - V^targ)^2  w.r.t. theta_V
            buffer += (s, V^targ)
        pi_old <- pi on every s of the buffer                                                 the auxiliary phase
        E_aux epochs on L^joint = 1/2 (V_aux - V^targ)^2 + beta_clone * KL[pi_old, pi]  w.r.t. theta_pi
                    and on L^value  w.r.t. theta_V

Why: what the value function learns about a state serves the policy too, but trained together the two losses pull at
the same features and must reuse samples equally often, though the policy does best with about one pass over them and
the value function, a regression, profits from more (paper, "Policy Sample Reuse", "Value Sample Reuse"). So the policy
phase keeps them apart, and the auxiliary phase brings the value function's features into the policy network, in several
epochs, while the KL term holds what pi does.

The file goes flags, networks, environments, math, training; after that comes the plumbing that keeps a run alive.

Where this file departs from the official code, or the paper is silent:
1. A single network (--arch shared) detaches its value head from the features in the policy phase only; the auxiliary
   phase takes the full value gradient, as section 3.6 says. Official: detached there too (--detach-value always).
2. Policy and value epochs (E_pi, E_V) run side by side in one loop with one Adam. The official code runs them one after
   the other with an Adam each when they differ. With two networks that is the same: no gradient, no step. With one, the
   epochs that only E_V has train the value head alone (--detach-value never: the encoder too).
3. The step count is reached, rounded up to a rollout, and an auxiliary phase follows every complete policy phase. The
   official code skips the last one.
4. The auxiliary phase computes in bfloat16 where the hardware has it, and convolutions on CUDA in TF32 (--precision).
5. Defaults are easy levels, 64 environments and 25 M steps. The paper: --distribution-mode hard --num-envs 256
   --total-timesteps 100_000_000.

Shapes: N environments, T steps per rollout, S = N_pi * N segments in the phase buffer, A actions, B a flat batch.
A segment is the T steps of one environment in one rollout: a row of every [N, T] and [S, T] tensor, and the unit that
minibatches are made of in both phases.
"""

import argparse
import contextlib
import ctypes
import difflib
import fcntl
import hashlib
import io
import math
import os
import pickle
import platform
import random
import shlex
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path


def fail(message):
    """End with exit status 2 and one line on stderr: what is wrong, and what would be right."""
    print(f"ppg_procgen.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from Ctrl-C during the imports, which take seconds
if not (sys.platform == "linux" and platform.machine() == "x86_64" and (3, 10) <= sys.version_info[:2] <= (3, 12)):
    here = f"Python {platform.python_version()} on {sys.platform} {platform.machine()}"
    fail(f"Procgen is built for Python 3.10, 3.11 and 3.12 on Linux x86-64 only; this is {here}")

import numpy as np
import torch
import torch.nn.functional as F
from gym_notices import notices
from torch import nn
from torch.utils.tensorboard import SummaryWriter

notices.notices.clear()  # `import gym` would print four lines about its end of life to stderr; gym 0.26.2 is pinned
import gym
from procgen import ProcgenGym3Env

# ---------------------------------------------------------------------------------------------------------------- flags

# game: (R_min, R_max) on easy and on hard levels (Procgen paper, arXiv:1912.01588, appendix C), further modes
GAMES = {
    "bigfish": ((1, 40), (0, 40), ()),
    "bossfight": ((0.5, 13), (0.5, 13), ()),
    "caveflyer": ((3.5, 12), (2, 13.4), ("memory", "exploration")),
    "chaser": ((0.5, 13), (0.5, 14.2), ("extreme",)),
    "climber": ((2, 12.6), (1, 12.6), ("exploration",)),
    "coinrun": ((5, 10), (5, 10), ("exploration",)),
    "dodgeball": ((1.5, 19), (1.5, 19), ("extreme", "memory")),
    "fruitbot": ((-1.5, 32.4), (-0.5, 27.2), ()),
    "heist": ((3.5, 10), (2, 10), ("memory", "exploration")),
    "jumper": ((3, 10), (1, 10), ("memory", "exploration")),
    "leaper": ((3, 10), (1.5, 10), ("extreme", "exploration")),
    "maze": ((5, 10), (4, 10), ("memory", "exploration")),
    "miner": ((1.5, 13), (1.5, 20), ("memory",)),
    "ninja": ((3.5, 10), (2, 10), ("exploration",)),
    "plunder": ((4.5, 30), (3, 30), ()),
    "starpilot": ((2.5, 64), (1.5, 35), ("extreme",)),
}


def count(text):
    """A whole number: 64, 25_000_000 or 25e6."""
    if not (value := float(text)).is_integer():
        raise ValueError(text)
    return int(value)


def parse_args(argv=None):
    """Flags -> Namespace. Wrong ones end in `fail`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    # environment
    flag("--env-id", default="starpilot", help="one of the 16 Procgen games")
    flag("--distribution-mode", default="easy", help="easy, hard, or what else the game has (paper: hard)")
    flag("--num-levels", type=count, default=0, help="number of training levels, 0 = all (paper: 0)")
    flag("--start-level", type=count, default=0, help="first training level, with --num-levels only")
    flag("--num-envs", type=count, default=64, help="environments that step together (paper: 256)")
    flag("--num-steps", type=count, default=256, help="steps of each environment per rollout (paper: 256)")
    flag("--total-timesteps", type=count, default=25_000_000, help="environment steps in all (paper: 100e6)")
    flag("--seed", type=count, default=1, help="seed of torch, numpy and Procgen")
    # networks
    flag("--arch", default="dual", choices=("dual", "shared"), help="two networks, or one (paper: dual)")
    detach = "phases without value gradient into the shared encoder (paper: policy, official: always, PPO: never)"
    flag("--detach-value", default="policy", choices=("policy", "always", "never"), help=detach)
    # policy phase
    flag("--learning-rate", type=float, default=5e-4, help="Adam's step size, policy phase (paper: 5e-4)")
    flag("--gamma", type=float, default=0.999, help="discount of the return (paper: 0.999)")
    flag("--gae-lambda", type=float, default=0.95, help="lambda of advantage estimation (paper: 0.95)")
    flag("--reward-norm-gamma", type=float, default=0.99, help="discount in reward normalisation (official: 0.99)")
    flag("--num-minibatches", type=count, default=8, help="minibatches per policy-phase epoch (paper: 8)")
    flag("--clip-coef", type=float, default=0.2, help="clip range of the ratio, 0 = no clipping (paper: 0.2)")
    flag("--kl-coef", type=float, default=0.0, help="weight of 1/2 (log ratio)^2 (paper: 0; PPG-KL: 1, unclipped)")
    flag("--ent-coef", type=float, default=0.01, help="weight of the entropy bonus, beta_S (paper: 0.01)")
    flag("--n-pi", type=count, default=32, help="rollouts per phase, N_pi (paper: 32)")
    flag("--e-pi", type=count, default=1, help="policy epochs per rollout, E_pi (paper: 1; PPO: 3)")
    flag("--e-v", type=count, default=1, help="value epochs per rollout, E_V (paper: 1; PPO: 3)")
    # auxiliary phase
    flag("--e-aux", type=count, default=6, help="auxiliary epochs per phase, E_aux, 0 = none (paper: 6; PPO: 0)")
    flag("--beta-clone", type=float, default=1.0, help="weight of KL[pi_old, pi] (paper: 1)")
    flag("--num-aux-minibatches", type=count, default=16, help="num_envs / this = segments a minibatch (paper: 16)")
    flag("--aux-learning-rate", type=float, default=5e-4, help="Adam's step size, auxiliary phase (paper: 5e-4)")
    # machine and output
    flag("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto = cuda where there is one")
    precision = "fp32, bf16: everywhere; auto = bf16 in the auxiliary phase only, where the hardware has it"
    flag("--precision", default="auto", choices=("auto", "fp32", "bf16"), help=precision)
    compiled = "run the rollout's and both training steps through torch.compile (None = on for CUDA)"
    flag("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    flag("--exp-name", default="ppg_procgen", help="part of the default run directory")
    flag("--run-dir", help="where all is written; None = runs/{env_id}__{exp_name}__{seed}__{time}")
    flag("--resume", metavar="RUN_DIR", help="continue that run from its last checkpoint, with its flags")
    flag("--checkpoint-every", type=count, default=1, help="phases from checkpoint to checkpoint, 0 = none at all")
    defaults = vars(parser.parse_args([]))
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, parser))))
    typed = {name: value for name, value in typed.items() if value is not parser}  # what the user really gave
    saved = saved_flags(defaults, typed) if "resume" in typed else {}
    args = argparse.Namespace(**{**defaults, **saved, **typed})
    validate(args, typed)
    return args


# ------------------------------------------------------------------------------------------------------------- networks


def normed(layer, norm):
    """Scale each output row or filter of a layer to this L2 norm, biases to 0 (official torch_util.py).

    The initial scale of a layer's output then does not depend on its number of inputs; a head's 0.1 makes the first
    policy nearly uniform and the first values nearly 0.
    """
    with torch.no_grad():
        layer.weight *= norm / layer.weight.flatten(1).norm(dim=1).view(-1, *[1] * (layer.weight.dim() - 1))
        layer.bias.zero_()
    return layer


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))); channels and image size stay as they are."""

    def __init__(self, channels):
        super().__init__()
        norm = (3**-0.5 * 2**-0.5) ** 0.5  # two convs multiply, hence the root; 3 stacks of 2 blocks add up
        self.conv0 = normed(nn.Conv2d(channels, channels, 3, padding=1), norm)
        self.conv1 = normed(nn.Conv2d(channels, channels, 3, padding=1), norm)

    def forward(self, x):
        return x + self.conv1(F.relu(self.conv0(F.relu(x)), inplace=True))


class ImpalaEncoder(nn.Module):
    """IMPALA's residual network (arXiv:1802.01561): uint8 images [B, H, W, C] -> fp32 features [B, 256]."""

    def __init__(self, observation_shape, stacks=(16, 32, 32), num_features=256):
        super().__init__()
        height, width, channels = observation_shape
        layers = []
        for out in stacks:
            layers += [normed(nn.Conv2d(channels, out, 3, padding=1), 1.0), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [ResidualBlock(out), ResidualBlock(out)]
            height, width, channels = (height + 1) // 2, (width + 1) // 2, out
        self.stacks = nn.Sequential(*layers)
        self.dense = normed(nn.Linear(channels * height * width, num_features), 1.4)
        self.to(memory_format=torch.channels_last)

    def forward(self, obs, bf16=False):
        # [B, H, W, C] permuted to [B, C, H, W] *is* channels_last: no copy. 0..255 are exact in bfloat16.
        x = obs.permute(0, 3, 1, 2).to(torch.bfloat16 if bf16 else torch.float32) / 255
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=bf16):
            features = F.relu(self.dense(F.relu(self.stacks(x)).flatten(1)))  # flattened as (c, h, w)
        return features.float()  # the heads stay fp32 in every precision: their outputs enter ratios and KLs


class Agent(nn.Module):
    """theta_pi = policy_encoder, policy_head, aux_value_head; theta_V = value_encoder, value_head.
    With arch "shared" there is no value_encoder: all three heads stand on the policy encoder (paper, section 3.6)."""

    def __init__(self, observation_shape, num_actions, arch):
        super().__init__()
        self.arch = arch
        self.policy_encoder = ImpalaEncoder(observation_shape)
        self.policy_head = normed(nn.Linear(256, num_actions), 0.1)
        self.aux_value_head = normed(nn.Linear(256, 1), 0.1)
        self.value_encoder = ImpalaEncoder(observation_shape) if arch == "dual" else None
        self.value_head = normed(nn.Linear(256, 1), 0.1)

    def forward(self, obs, bf16=False, detach_value=False, policy=True, value=True):
        """uint8 [B, H, W, C] -> logits [B, A], auxiliary values [B], values [B].

        `detach_value` stops the value gradient at the shared features. With two networks, the outputs of one that is
        not asked for (policy, value) are None.
        """
        logits = aux_value = new_value = None
        if policy or self.arch == "shared":
            features = self.policy_encoder(obs, bf16)
            logits, aux_value = self.policy_head(features), self.aux_value_head(features).squeeze(-1)
        if value or self.arch == "shared":
            if self.arch == "dual":
                features = self.value_encoder(obs, bf16)
            elif detach_value:
                features = features.detach()
            new_value = self.value_head(features).squeeze(-1)
        return logits, aux_value, new_value


# --------------------------------------------------------------------------------------------------------- environments


class ProcgenVectorEnv(gym.vector.VectorEnv):
    """Procgen behind gym 0.26's vector interface: uint8 images [N, 64, 64, 3], 15 actions, reset within the same step.

    An episode's end is `terminated`, Procgen's time limit included, which it does not report; `truncated` is all false.
    """

    def __init__(self, env_id, num_envs, distribution_mode, num_levels, start_level, seed, num_threads):
        # exploration mode has a level of its own
        levels = {"num_levels": num_levels, "start_level": start_level} if distribution_mode != "exploration" else {}
        options = {"distribution_mode": distribution_mode, "rand_seed": seed, "num_threads": num_threads, **levels}
        self.procgen = ProcgenGym3Env(num=num_envs, env_name=env_id, **options)
        self.fresh = True  # no step yet: the first observations are those of new episodes
        images = gym.spaces.Box(0, 255, self.procgen.ob_space["rgb"].shape, np.uint8)
        super().__init__(num_envs, images, gym.spaces.Discrete(self.procgen.ac_space.eltype.n))

    def reset_wait(self, seed=None, options=None):
        """-> observations, {}. Procgen draws its levels from the seed given at construction; `seed` must be None."""
        if seed is not None:
            raise ValueError("Procgen is seeded when it is made, not at reset")
        if not self.fresh:
            self.procgen.act(np.full(self.num_envs, -1))  # Procgen's action -1 ends the episode
        return self.procgen.observe()[1]["rgb"], {}

    def step_async(self, actions):
        """Start a step on Procgen's threads and return; actions: integers [N]."""
        self.fresh = False
        self.procgen.act(actions)

    def step_wait(self):
        """-> observations [N, 64, 64, 3], rewards [N], terminated [N], truncated [N], {}."""
        rewards, obs, first = self.procgen.observe()
        return obs["rgb"], rewards, first, np.zeros_like(first), {}

    def get_state(self):
        """-> the exact state of every environment, uint8 [bytes] each; what an environment needs to resume exactly."""
        return [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self.procgen.callmethod("get_state")]

    def set_state(self, states):
        self.fresh = False
        self.procgen.callmethod("set_state", [state.numpy().tobytes() for state in states])

    def close_extras(self, **kwargs):
        self.procgen.close()


def make_envs(args):
    """Replace this to train elsewhere: return any gym vector env with uint8 images [H, W, C] and discrete actions."""
    levels = args.distribution_mode, args.num_levels, args.start_level
    return ProcgenVectorEnv(args.env_id, args.num_envs, *levels, args.seed, num_threads=len(os.sched_getaffinity(0)))


class EpisodeStatistics:
    """Undiscounted returns and lengths of all episodes that end, from the raw rewards."""

    def __init__(self, num_envs):
        self.returns = torch.zeros(num_envs, dtype=torch.float64)  # of the episodes under way
        self.lengths = torch.zeros(num_envs, dtype=torch.int64)
        self.ended = []  # (return, length) of every episode that ended in this rollout
        self.recent = []  # returns of the last 100 episodes

    def update(self, rewards, dones):
        """One step's rewards and dones, [N] each."""
        self.returns += torch.as_tensor(rewards)
        self.lengths += 1
        for i in torch.as_tensor(dones).nonzero().flatten():
            self.ended.append((self.returns[i].item(), self.lengths[i].item()))
            self.recent = [*self.recent[-99:], self.returns[i].item()]
            self.returns[i] = self.lengths[i] = 0


class RewardNormalizer:
    """Divides rewards by the running standard deviation of the discounted return, then clips them to +-10.

    One learning rate then serves games whose scores differ by a factor of ten. The mean is not subtracted: that would
    amount to a reward or a fine for each step survived. The moments take in the whole rollout before it is divided
    (official reward_normalizer.py, RewardNormalizer).
    """

    def __init__(self, num_envs, gamma):
        self.gamma = gamma
        self.discounted = torch.zeros(num_envs, dtype=torch.float64)  # sum of the episode's rewards so far
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, rewards, dones):
        """rewards, dones (dones[:, t]: step t ended an episode): [N, T] -> normalised rewards [N, T] fp32."""
        rewards, dones = torch.as_tensor(rewards), torch.as_tensor(dones)
        sums = torch.empty(rewards.shape, dtype=torch.float64)
        for t in range(rewards.shape[1]):
            sums[:, t] = self.discounted = self.gamma * self.discounted + rewards[:, t]
            self.discounted = self.discounted * (1 - dones[:, t])
        n, mean, var = sums.numel(), sums.mean().item(), sums.var(correction=0).item()
        total, delta = self.count + n, mean - self.mean
        self.var = (self.var * self.count + var * n + delta**2 * self.count * n / total) / total
        self.mean, self.count = self.mean + delta * n / total, total
        return (rewards / math.sqrt(self.var + 1e-8)).clamp(-10, 10)


# ----------------------------------------------------------------------------------------------------------------- math


def compute_gae(rewards, values, dones, gamma, gae_lambda):
    """Generalised advantage estimation (arXiv:1506.02438): A_t = sum over l of (gamma lambda)^l delta_{t+l}.

    delta_t = r_t + gamma V_{t+1} - V_t is how much better step t went than V had said. lambda 0 trusts V, and inherits
    its errors; lambda 1 trusts the rewards that followed, and inherits their noise. The sum ends with the episode or
    the rollout; from the back it is one product a step.

    rewards, dones [N, T], values [N, T+1]; dones[:, t] says that step t ended an episode, so that values[:, t+1] is of
    the next one and does not count. -> advantages [N, T], value targets V^targ = A + V [N, T].
    """
    advantages, advantage = torch.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[1])):
        not_done = 1.0 - dones[:, t]
        delta = rewards[:, t] + gamma * not_done * values[:, t + 1] - values[:, t]
        advantages[:, t] = advantage = delta + gamma * gae_lambda * not_done * advantage
    return advantages, advantages + values[:, :-1]


def policy_loss(log_ratio, advantages, clip_coef, kl_coef):
    """-L^clip (PPO, arXiv:1707.06347), plus kl_coef times 1/2 (log ratio)^2; all [B] -> scalar. clip_coef 0: unclipped.

    Clipping removes the incentive to move a ratio beyond the range, but not the gradient that brings it back. The
    penalty is the second-order estimate of the KL, as in the official code (ppo.py, compute_losses).
    """
    ratio = log_ratio.exp()
    surrogate = -advantages * ratio
    if clip_coef > 0:
        surrogate = torch.maximum(surrogate, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))
    return surrogate.mean() + kl_coef * 0.5 * log_ratio.square().mean()


def value_loss(values, targets):
    """1/2 (V - V^targ)^2, unclipped; [B] -> scalar."""
    return 0.5 * (values - targets).square().mean()


def kl_divergence(old_logits, new_logits):
    """KL[pi_old, pi] over all actions in nats, mean over the batch; logits [B, A] -> scalar, exactly 0 if equal.

    In this direction pi is penalised for losing actions that pi_old took: the loss of behavioural cloning.
    """
    old, new = F.log_softmax(old_logits, dim=-1), F.log_softmax(new_logits, dim=-1)
    return (old.exp() * (old - new)).sum(-1).mean()


@torch.no_grad()
def act(agent, obs, bf16=False):
    """uint8 [N, H, W, C] -> sampled actions [N], their log-probabilities [N], values [N]."""
    logits, _, values = agent(obs, bf16)
    logprobs = F.log_softmax(logits, dim=-1)
    # argmax of p / Exp(1) noise is a sample of p, without the GPU synchronisation of torch.multinomial
    actions = (logprobs.exp() / torch.empty_like(logprobs).exponential_()).argmax(-1)
    return actions, logprobs.gather(-1, actions[:, None]).squeeze(-1), values


def policy_phase_loss(agent, args, bf16, train_policy, train_value, batch):
    """Losses of Algorithm 1's policy phase on a flat batch (obs, actions, old log-probabilities, advantages, targets).

    -> loss, its parts [5]: policy loss, entropy, approximate KL, clipped fraction, value loss. Adding up the two losses
    mixes nothing: two networks share no parameter, and with one the value gradient stops at the value head (unless
    --detach-value never, PPO's sharing).
    """
    obs, actions, old_logprobs, advantages, targets = batch
    detach = args.detach_value != "never"
    logits, _, values = agent(obs, bf16, detach, policy=train_policy, value=train_value)
    loss, parts = 0.0, [torch.zeros((), device=obs.device)] * 5
    if train_policy:
        logprobs = F.log_softmax(logits, dim=-1)
        log_ratio = logprobs.gather(-1, actions[:, None]).squeeze(-1) - old_logprobs
        pi_loss = policy_loss(log_ratio, advantages, args.clip_coef, args.kl_coef)
        entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
        ratio = log_ratio.exp()
        approx_kl = (ratio - 1 - log_ratio).mean()  # never negative, and of less variance than -log_ratio
        clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
        loss, parts[:4] = pi_loss - args.ent_coef * entropy, (pi_loss, entropy, approx_kl, clipfrac)
    if train_value:
        parts[4] = value_loss(values, targets)
        loss = loss + parts[4]
    return loss, torch.stack(parts).detach()


def auxiliary_phase_loss(agent, args, bf16, batch):
    """Losses of Algorithm 1's auxiliary phase, L^joint + L^value, on a flat batch (obs, pi_old's logits, targets).

    -> loss, its parts [3]: KL, auxiliary value loss, true value loss. The auxiliary value loss is what brings the value
    function's features into the policy network; behavioural cloning, the KL term, holds its behaviour in place. With
    one network both value losses reach the encoder, unless --detach-value always. The auxiliary values serve no other
    end.
    """
    obs, old_logits, targets = batch
    logits, aux_values, values = agent(obs, bf16, detach_value=args.detach_value == "always")
    parts = kl_divergence(old_logits, logits), value_loss(aux_values, targets), value_loss(values, targets)
    kl, aux_value_loss, real_value_loss = parts
    loss = aux_value_loss + args.beta_clone * kl + real_value_loss  # L^joint = L^aux + beta_clone * KL[pi_old, pi]
    return loss, torch.stack(parts).detach()


def minibatches(num_segments, size, epochs):
    """Yield (epoch, rows) with `size` segment indices each: every epoch a new permutation of all segments.

    Whole segments, not single transitions, as in the official code, whose loader splits the environment axis: they lie
    together in memory, at the price that the steps of a minibatch are correlated.
    """
    for epoch in range(epochs):
        for rows in torch.randperm(num_segments).split(size):
            yield epoch, rows.tolist()


def gather(rows, device, *tensors):
    """Rows of [S, T, ...] tensors -> flat batches [len(rows) * T, ...] on the device."""
    return [torch.stack([x[row].to(device, non_blocking=True) for row in rows]).flatten(0, 1) for x in tensors]


def train_minibatch(optimizer, loss_of, batch, chunk_size):
    """One optimizer step on a flat batch of tensors [B, ...]; loss_of(chunk of the batch) -> loss, parts. -> parts.

    The batch goes through in chunks of chunk_size, for memory; their gradients add up to that of the whole.
    A parameter that no loss reaches keeps grad None, so that Adam leaves it alone; at a zero gradient it would move it.
    """
    optimizer.zero_grad()
    mean_parts = 0.0
    for chunk in zip(*(tensor.split(chunk_size) for tensor in batch), strict=True):
        share = len(chunk[0]) / len(batch[0])
        loss, parts = loss_of(chunk)
        (loss * share).backward()
        mean_parts += parts * share
    optimizer.step()
    return mean_parts


# ------------------------------------------------------------------------------------------------------------- training


def train(args):
    """Algorithm 1 of the paper -> the trained Agent. Writes TensorBoard files and agent.pt into the run directory."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # the first two for environments that draw from them
        seed(args.seed)
    device, policy_bf16, aux_bf16 = choose_device(args)
    envs = make_envs(args)
    N, T, image = args.num_envs, args.num_steps, envs.single_observation_space.shape
    num_iterations = math.ceil(args.total_timesteps / (N * T))  # deviation 3: rounded up
    has_aux_phase = args.e_aux > 0 and num_iterations >= args.n_pi
    agent = Agent(image, int(envs.single_action_space.n), args.arch).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    aux_optimizer = torch.optim.Adam(agent.parameters(), lr=args.aux_learning_rate, fused=True)
    act_step, policy_step, aux_step = steps_for(args, device)

    # The phase buffer (Algorithm 1's B) of S segments, filled in place by the rollouts. uint8 images, a quarter of what
    # floats would take, are turned into floats a batch at a time. Without auxiliary phases it keeps one rollout.
    S = N * (args.n_pi if has_aux_phase else 1)
    phase_obs = allocate_observations(args, (S, T, *image), device)
    phase_targets = torch.zeros(S, T, device=device)
    actions = torch.zeros(N, T, dtype=torch.int64, device=device)
    logprobs, values = torch.zeros(N, T, device=device), torch.zeros(N, T + 1, device=device)
    rewards, dones = torch.zeros(N, T), torch.zeros(N, T)  # on the host, like all that environments give
    # Observations per pass through the networks. A GPU takes whole minibatches: a second forward pass would overwrite
    # the gradients that the CUDA graph of the first one left. On a CPU, 256 at a time are within 3 % of the fastest and
    # keep the activations small; 128 do where two networks hold them.
    chunk_size = S * T if device.type == "cuda" else 256 if args.arch == "shared" else 128

    lock = open_run_dir(args)
    announce(args, agent, phase_obs, device, policy_bf16, aux_bf16)
    episodes, normalize = EpisodeStatistics(N), RewardNormalizer(N, args.reward_norm_gamma)
    state = (agent, optimizer, aux_optimizer), (episodes, normalize), envs
    next_obs, _ = envs.reset()
    phase = global_step = 0
    if args.resume:
        phase, global_step, next_obs = restore(args, device, *state, next_obs)
    iteration = phase * args.n_pi
    writer = SummaryWriter(args.run_dir, purge_step=global_step + 1)  # what a killed run logged after its checkpoint
    flags = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{flags}", global_step)
    if args.checkpoint_every and not args.resume:
        save_checkpoint(args, device, *state, next_obs, phase, global_step)
    progress = Progress(global_step, num_iterations * N * T, args.n_pi * N * T, has_aux_phase)

    while iteration < num_iterations:
        phase += 1
        # ---- Policy phase (Alg. 1): N_pi iterations of rollout and update; the last phase may be shorter ----
        for i in range(min(args.n_pi, num_iterations - iteration)):
            # Roll out the current policy; dones[:, t] tells that step t, taken in obs[:, t], ended an episode.
            segments = slice(i * N, (i + 1) * N) if has_aux_phase else slice(N)
            obs, episodes.ended = phase_obs[segments], []
            for t in range(T):
                obs[:, t] = frame = torch.from_numpy(next_obs)
                actions[:, t], logprobs[:, t], values[:, t] = act_step(agent, frame.to(device), policy_bf16)
                envs.step_async(actions[:, t].cpu().numpy())  # waits for the GPU, once a step
                next_obs, reward, terminated, truncated, _ = envs.step_wait()
                rewards[:, t], dones[:, t] = torch.from_numpy(reward), torch.from_numpy(terminated | truncated)
                episodes.update(rewards[:, t], dones[:, t])
            values[:, T] = act_step(agent, torch.from_numpy(next_obs).to(device), policy_bf16)[2]  # for GAE; not a step
            global_step, iteration = global_step + N * T, iteration + 1
            rollout_seconds = progress.lap("rollout")

            # V^targ, A <- GAE, on the host: T small operations in a row. A is normalised over the full batch, not over
            # each minibatch, so that an advantage does not depend on the segments it was drawn with.
            values_on_host = values.cpu()
            scaled_rewards = normalize(rewards, dones)
            advantages, targets = compute_gae(scaled_rewards, values_on_host, dones, args.gamma, args.gae_lambda)
            unexplained = (targets - values_on_host[:, :-1]).var() / targets.var()
            advantages = ((advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)).to(device)
            phase_targets[segments] = targets.to(device)  # buffer += (s, V^targ); s is in place already

            # E_pi epochs of -L^clip - beta_S * entropy w.r.t. theta_pi, E_V epochs of L^value w.r.t. theta_V.
            # A loss takes part while its own epochs last; parameters that no remaining loss reaches are not stepped.
            parts = torch.zeros(len(POLICY_TAGS), device=device)
            data = obs, actions, logprobs, advantages, phase_targets[segments]
            for epoch, rows in minibatches(N, N // args.num_minibatches, max(args.e_pi, args.e_v)):
                loss_of = partial(policy_step, agent, args, policy_bf16, epoch < args.e_pi, epoch < args.e_v)
                parts += train_minibatch(optimizer, loss_of, gather(rows, device, *data), chunk_size)
            parts = (parts / args.num_minibatches).tolist()  # waits for the GPU, once an iteration
            trim_heap()
            policy_seconds = progress.lap("policy_phase")

            epochs = args.e_pi, args.e_pi, args.e_pi, args.e_pi, args.e_v
            scalars = {tag: part / n for tag, part, n in zip(POLICY_TAGS, parts, epochs, strict=True)}
            check_finite({"return (V^targ)": targets, **scalars}, f"phase {phase}, policy phase, step {global_step}")
            if args.clip_coef == 0:
                del scalars["losses/clipfrac"]
            scalars |= {
                "losses/explained_variance": 1 - unexplained.item(),
                "charts/learning_rate": args.learning_rate,
                "charts/SPS": progress.rate(global_step),
                "time/rollout": rollout_seconds,
                "time/policy_phase": policy_seconds,
                **episode_scalars(args, episodes),
            }
            for name, value in scalars.items():
                writer.add_scalar(name, value, global_step)
            progress.print_iteration(global_step, scalars, episodes)

        if has_aux_phase and iteration == phase * args.n_pi:
            # ---- Auxiliary phase (Alg. 1), with an Adam of its own, as in the official code ----
            # pi_old(.|s) for the whole buffer, in the epochs' precision and batch sizes: their first KL is exactly 0,
            # but for the rounding of compiled steps and of a shorter last chunk (1e-10).
            aux_size = N // args.num_aux_minibatches  # segments in a minibatch
            # Into one tensor as they come: thousands of small ones, kept among large blocks that go, riddle the heap.
            old_logits = torch.empty(S, T, agent.policy_head.out_features, device=device)
            for row in range(0, S, aux_size):
                chunks = phase_obs[row : row + aux_size].flatten(0, 1).to(device).split(chunk_size)
                with torch.no_grad():
                    logits = torch.cat([agent(chunk, aux_bf16, value=False)[0] for chunk in chunks])
                old_logits[row : row + aux_size] = logits.unflatten(0, (aux_size, T))
            data = phase_obs, old_logits, phase_targets

            # E_aux epochs of L^joint w.r.t. theta_pi and L^value w.r.t. theta_V; V^targ stays what the rollouts gave.
            parts, steps_per_epoch = torch.zeros(args.e_aux, len(AUX_TAGS)).to(device), S // aux_size
            loss_of = partial(aux_step, agent, args, aux_bf16)
            for k, (epoch, rows) in enumerate(minibatches(S, aux_size, args.e_aux)):
                parts[epoch] += train_minibatch(aux_optimizer, loss_of, gather(rows, device, *data), chunk_size)
                progress.print_auxiliary(phase, epoch, k % steps_per_epoch + 1, steps_per_epoch, parts)
                if k % 64 == 0:
                    trim_heap()
            last_epoch = (parts[-1] / steps_per_epoch).tolist()
            scalars = dict(zip(AUX_TAGS, last_epoch, strict=True))
            scalars["time/auxiliary_phase"] = progress.lap("auxiliary_phase")
            check_finite(scalars, f"phase {phase}, auxiliary phase, step {global_step}")
            for name, value in scalars.items():
                writer.add_scalar(name, value, global_step)

        # ---- Phase boundary: the buffer is used up, so that a checkpoint is small and exact ----
        progress.end_phase(global_step)
        check_finite(agent.state_dict(), f"phase {phase}, step {global_step}")
        writer.flush()
        weights = {"args": vars(args), "image": image, "global_step": global_step, "agent": agent.state_dict()}
        save(Path(args.run_dir, "agent.pt"), weights)
        whole, last = iteration == phase * args.n_pi, num_iterations - iteration < args.n_pi  # the last whole phase
        if args.checkpoint_every and whole and (last or phase % args.checkpoint_every == 0):
            save_checkpoint(args, device, *state, next_obs, phase, global_step)
    progress.print_summary(args.run_dir)
    writer.close()
    envs.close()
    lock.close()
    return agent


# --------------------------------------------------------------------------------------- plumbing: metrics and console

POLICY_TAGS = [f"losses/{name}" for name in ("policy_loss", "entropy", "approx_kl", "clipfrac", "value_loss")]
AUX_TAGS = ("losses/aux/kl_loss", "losses/aux/aux_value_loss", "losses/aux/real_value_loss")


def episode_scalars(args, episodes):
    """Means over all episodes that ended in this rollout; nothing where none did."""
    if not episodes.ended:
        return {}
    mean_return, mean_length = np.mean(episodes.ended, axis=0)
    scalars = {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
    if args.distribution_mode in ("easy", "hard"):  # the other modes have no published range
        low, high = GAMES[args.env_id][("easy", "hard").index(args.distribution_mode)]
        scalars["charts/normalized_return"] = (mean_return - low) / (high - low)
    return scalars


def check_finite(tensors, where):
    """Stop the run, exit status 1, at NaN or infinity. The last checkpoint stays as it is."""
    for name, value in tensors.items():
        if not torch.as_tensor(value).isfinite().all():
            raise SystemExit(f"ppg_procgen.py: stopped: {name} is not finite in {where}; try a smaller learning rate")


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


class Progress:
    """Times, rates and the console."""

    def __init__(self, first_step, total_steps, steps_per_phase, has_aux_phase):
        self.first, self.total = first_step, total_steps
        self.steps_per_phase, self.has_aux_phase = steps_per_phase, has_aux_phase
        self.seconds = dict.fromkeys(("rollout", "policy_phase", "auxiliary_phase"), 0.0)
        self.start = self.lap_start = self.phase_start = self.last_line = time.perf_counter()
        self.phase_step, self.phases = first_step, []  # (environment steps, seconds) of each phase that is over

    def lap(self, part):
        """Book the time since the last lap to this part of the algorithm -> seconds."""
        seconds, self.lap_start = time.perf_counter() - self.lap_start, time.perf_counter()
        self.seconds[part] += seconds
        return seconds

    def rate(self, step):
        """Environment steps/s over the last whole phase; since the start, before the first is over."""
        steps, seconds = self.phases[-1] if self.phases else (step - self.first, time.perf_counter() - self.start)
        return steps / seconds

    def end_phase(self, step):
        now = time.perf_counter()
        self.phases.append((step - self.phase_step, now - self.phase_start))
        self.phase_step, self.phase_start, self.lap_start = step, now, now

    def print_iteration(self, step, scalars, episodes):
        rate, recent = self.rate(step), f"{np.mean(episodes.recent):.2f}" if episodes.recent else "-"
        elapsed = time.perf_counter() - self.phase_start
        seconds = (self.total - self.phase_step) / rate - elapsed
        known = bool(self.phases)  # how long an auxiliary phase takes is not known before the first is over
        if not self.has_aux_phase or self.total - self.phase_step < self.steps_per_phase:  # no auxiliary phase ahead
            known, seconds = True, elapsed * (self.total - step) / (step - self.phase_step)
        left = duration(max(0, seconds)) if known else "?"
        kl, ev = scalars["losses/approx_kl"], scalars["losses/explained_variance"]
        line = f"step {step:,}/{self.total:,} {step / self.total:.1%} | return {recent} (n={len(episodes.ended)})"
        print(f"{line} | kl {kl:.4f} | ev {ev:.2f} | {rate:,.0f} steps/s | left {left}", flush=True)

    def print_auxiliary(self, phase, epoch, k, minibatches_per_epoch, parts):
        """A line at the end of each epoch and once a minute; reading `parts` waits for the GPU."""
        if k < minibatches_per_epoch and time.perf_counter() < self.last_line + 60:
            return
        self.last_line, epochs = time.perf_counter(), epoch + k / minibatches_per_epoch
        # pi_old's forward pass, before the epochs, takes about a third of one
        left = duration((self.last_line - self.lap_start) * (len(parts) - epochs) / (epochs + 1 / 3))
        means = zip(AUX_TAGS, (parts[epoch] / k).tolist(), strict=True)
        losses = " | ".join(f"{Path(tag).name.replace('_', ' ')} {mean:.4f}" for tag, mean in means)
        where = f"  auxiliary phase {phase}, epoch {epoch + 1}/{len(parts)} {epochs / len(parts):.0%}"
        print(f"{where} | {losses} | left {left}", flush=True)

    def print_summary(self, run_dir):
        if not self.phases:
            print(f"{run_dir} is complete at step {self.first:,}: a larger --total-timesteps extends it", flush=True)
            return
        wall = time.perf_counter() - self.start
        whole = [phase for phase in self.phases if phase[0] == self.steps_per_phase]  # the last may be cut short
        steps, seconds = np.sum(whole[1:] or whole or self.phases, axis=0)
        counted = "all whole phases after the first" if whole[1:] else "one phase" if whole else "part of a phase"
        shares = ", ".join(f"{part.replace('_', ' ')} {t / wall:.0%}" for part, t in self.seconds.items())
        line = f"done in {duration(wall)} | {steps / seconds:,.0f} steps/s over {counted} | {shares}"
        print(f"{line} | {run_dir}/agent.pt", flush=True)


# ------------------------------------------------------------------------------------------ plumbing: files and signals


def open_run_dir(args):
    """Make the run directory, or enter that of --resume, and set args.run_dir -> its lock, an open file."""
    run_dir = Path(args.run_dir or f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
    except BlockingIOError:
        fail(f"another process is running in {run_dir}: choose another --run-dir")
    except OSError as error:
        fail(f"cannot write into the run directory {run_dir}: {error.strerror}")
    args.run_dir = str(run_dir)
    if any(run_dir.glob("*.pt")) and not args.resume:
        advice = f"continue it with --resume {shlex.quote(args.run_dir)}, or choose another --run-dir"
        fail(f"{run_dir} already holds a run: {advice}")
    return lock


def save(path, data, previous=None):
    """Write data and checksum to a new file, then rename: `path` (old: `previous`) is complete at every instant."""
    torch.save(data, buffer := io.BytesIO())  # by way of a buffer: torch turns a full disk into an internal error
    content, unfinished = buffer.getvalue(), path.with_suffix(".partial")  # a leftover is overwritten
    with unfinished.open("wb") as file:
        file.write(content + hashlib.sha256(content).digest())  # torch ignores it, and a flipped bit elsewhere too
        file.flush()
        os.fsync(file.fileno())
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(unfinished, path)


def load_agent(path, device="cpu"):
    """agent.pt of a run -> the Agent, the run's flags as a Namespace."""
    saved = torch.load(path, map_location=device, weights_only=True)
    args, weights = argparse.Namespace(**saved["args"]), saved["agent"]
    agent = Agent(saved["image"], len(weights["policy_head.bias"]), args.arch).to(device)
    agent.load_state_dict(weights)
    return agent, args


def save_checkpoint(args, device, learners, statistics, envs, next_obs, phase, global_step):
    """Everything needed to continue from a phase boundary, as tensors and plain values, which weights_only can load."""
    name, keys, *rest = np.random.get_state()
    data = {
        "position": (phase, global_step, device.type),
        "args": {**vars(args), "resume": None},
        "learners": [learner.state_dict() for learner in learners],
        "statistics": [vars(statistic) for statistic in statistics],
        "envs": envs.get_state() if hasattr(envs, "get_state") else None,
        "next_obs": torch.from_numpy(next_obs),
        "torch_random": (torch.get_rng_state(), torch.cuda.get_rng_state_all() if device.type == "cuda" else []),
        "host_random": (random.getstate(), (name, keys.tolist(), *rest)),
    }
    save(Path(args.run_dir, "checkpoint.pt"), data, previous=Path(args.run_dir, "checkpoint.previous.pt"))


def load_checkpoint(run_dir):
    """-> the newest undamaged checkpoint's content (None if there is none), and what is wrong with any newer file."""
    problems = []
    for path in (Path(run_dir, "checkpoint.pt"), Path(run_dir, "checkpoint.previous.pt")):
        try:
            content = path.read_bytes()
            if hashlib.sha256(content[:-32]).digest() != content[-32:]:
                raise ValueError("damaged: wrong checksum")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), problems
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as e:
            problems.append(f"{path.name}: {getattr(e, 'strerror', None) or str(e).partition(chr(10))[0]}")
    return None, problems


def saved_flags(defaults, typed):
    """The flags of the run to resume; `fail` where there is none, or a typed flag contradicts them."""
    data, problems = load_checkpoint(typed["resume"])
    if data is None:
        fail(f"--resume {typed['resume']}: no checkpoint to load ({'; '.join(problems)})")
    if differing := sorted(data["args"].keys() ^ defaults.keys()):
        fail(f"--resume {typed['resume']}: written by another version of this script; differing flags: {differing}")
    saved = {**data["args"], "run_dir": typed["resume"]}  # a run directory may have been moved
    for name in typed.keys() - {"resume", "total_timesteps", "checkpoint_every", "device"}:
        if typed[name] != saved[name]:
            fail(f"--{name.replace('_', '-')} {typed[name]}: the run has {saved[name]}; leave the flag out")
    return saved


def restore(args, device, learners, statistics, envs, next_obs):
    """Put a checkpoint's content back into place -> phase, global_step, next_obs."""
    data, problems = load_checkpoint(args.run_dir)
    if problems:
        print(f"warning: going on from checkpoint.previous.pt ({problems[0]})", file=sys.stderr)
        os.replace(Path(args.run_dir, "checkpoint.previous.pt"), Path(args.run_dir, "checkpoint.pt"))
    phase, global_step, saved_on = data["position"]
    if saved_on != device.type:
        print(f"warning: saved on {saved_on}, resumed on {device.type}: no longer bit-identical", file=sys.stderr)
    new, old = ({k: v.shape for k, v in w.items()} for w in (learners[0].state_dict(), data["learners"][0]))
    if differing := [name for name in {**new, **old} if new.get(name) != old.get(name)]:
        fail(f"--resume {args.run_dir}: written by another version of this script; differing parameters: {differing}")
    for learner, saved in zip(learners, data["learners"], strict=True):
        learner.load_state_dict(saved)
    for statistic, saved in zip(statistics, data["statistics"], strict=True):
        vars(statistic).update(saved)
    torch.set_rng_state(data["torch_random"][0])
    if device.type == "cuda":
        torch.cuda.set_rng_state_all(data["torch_random"][1][: torch.cuda.device_count()])
    random.setstate(data["host_random"][0])
    np.random.set_state(data["host_random"][1])
    if data["envs"] is not None:
        envs.set_state(data["envs"])
        return phase, global_step, data["next_obs"].numpy()
    print("warning: these environments have no get_state; their episodes begin anew", file=sys.stderr)
    for running_sum in (statistics[0].returns, statistics[0].lengths, statistics[1].discounted):
        running_sum.zero_()
    return phase, global_step, next_obs


def stop(args, reason, status):
    """End at once and say what is saved. No clean-up: the last checkpoint is complete at every instant."""
    saved = "nothing to resume is saved"
    if args.run_dir and (data := load_checkpoint(args.run_dir)[0]):
        command = shlex.join([sys.executable, sys.argv[0], "--resume", args.run_dir])
        saved = f"saved up to step {data['position'][1]:,}; continue with: {command}"
    os.write(2, f"\nppg_procgen.py: {reason}: {saved}\n".encode())
    os._exit(status)


# ------------------------------------------------------------------------------ plumbing: device, memory, flag checking


def has_bf16(device):
    """Whether bfloat16 matrix products run in hardware, not emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo").read_text().split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_device(args):
    """-> device, bf16 in the policy phase, bf16 in the auxiliary phase."""
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no CUDA device here; leave the flag out or use --device cpu")
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"  # convolutions, 98 % of all products; heads stay fp32
    if device.type == "cpu":
        # glibc gives large freed blocks back to the kernel, and every chunk faults them in again: 66,000 pages in fp32.
        # Keeping them makes training passes 1.3 times as fast (2 cores, AMX).
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30), mallopt(-1, 2**31 - 1)  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    return device, args.precision == "bf16", args.precision == "bf16" or (args.precision == "auto" and has_bf16(device))


def trim_heap():
    """Give back what choose_device told glibc to keep, about twice a minute: gaps between blocks can add up to GBs."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def steps_for(args, device):
    """-> act, policy_phase_loss, auxiliary_phase_loss: as they are, or compiled, on CUDA into CUDA graphs."""
    steps = act, policy_phase_loss, auxiliary_phase_loss
    if not (device.type == "cuda" if args.compile is None else args.compile):
        return steps
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except RuntimeError as error:  # no compiler
        print(f"warning: torch.compile fails, running without: {str(error).splitlines()[0]}", file=sys.stderr)
        return steps
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return [torch.compile(step, mode=mode, dynamic=False) for step in steps]


def free_memory(root="/"):
    """Bytes still to be had: MemAvailable, or what a cgroup (v1 or v2) leaves below its limit where that is less."""
    meminfo = dict(line.split(":") for line in Path(root, "proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    for line in Path(root, "proc/self/cgroup").read_text().splitlines():
        _, controller, path = line.split(":", 2)  # controller: "" in version 2, "memory" in version 1
        v1 = controller == "memory"
        limit, use = ("limit_in_bytes", "usage_in_bytes") if v1 else ("max", "current")
        group = Path(root, "sys/fs/cgroup", controller, path.lstrip("/"))
        for folder in (group, *group.parents) if v1 or not controller else ():  # any ancestor's limit counts
            with contextlib.suppress(OSError, ValueError):  # a container does not see all of them; "max" is no limit
                room = int((folder / f"memory.{limit}").read_text()) - int((folder / f"memory.{use}").read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free = min(free, room + int(stat["total_" * v1 + "inactive_file"]))  # cached files give way
    return free


def allocate_observations(args, shape, device):
    """The phase buffer, uint8 [S, T, H, W, C]: on the GPU where it fits, else pinned; an error if it fits nowhere."""
    needed, working = math.prod(shape), 1_500_000_000
    if device.type == "cuda":
        # In fp32 an observation's activations take 1.23 MB a network (counted on a CPU), and their gradients some more.
        minibatch = args.num_envs * args.num_steps // min(args.num_minibatches, args.num_aux_minibatches)
        if needed + 2e9 + minibatch * (4e6 if args.arch == "dual" else 2e6) < torch.cuda.mem_get_info()[0]:
            return torch.empty(shape, dtype=torch.uint8, device=device)
        needed = 2 ** (needed - 1).bit_length()  # torch takes pinned memory in powers of two
    if needed + working > (free := free_memory()):
        fits = int((free - working) / (math.prod(shape) / shape[0] * args.num_envs))
        advice = f"--n-pi {fits} is the largest that fits" if fits > 0 else "take fewer --num-envs or --num-steps"
        fail(f"the phase buffer takes {needed:,} bytes, training {working:,} more, and {free:,} are free: {advice}")
    return torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")


def announce(args, agent, phase_obs, device, policy_bf16, aux_bf16):
    """The first line of output, and a warning where no auxiliary phase will run."""
    levels = f"{args.num_levels} levels from {args.start_level}" if args.num_levels else "all levels"
    levels = "its own level" if args.distribution_mode == "exploration" else levels
    names = ["TF32" if device.type == "cuda" and args.precision != "fp32" else "fp32", "bf16"]
    missing = " (no bf16 in hardware)" if args.precision == "auto" and not aux_bf16 else ""
    aux = f"auxiliary phase {names[aux_bf16]}{missing}" if args.e_aux else "no auxiliary phase"
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    rollout = args.num_envs * args.num_steps
    print(
        f"{args.env_id} {args.distribution_mode}, {levels} | {args.arch}, "
        f"{sum(p.numel() for p in agent.parameters()):,} parameters | {args.num_envs} environments x {args.num_steps} "
        f"steps | {device.type} ({hardware}), policy phase {names[policy_bf16]}, {aux} | {args.n_pi * rollout:,} steps "
        f"per phase | phase buffer {phase_obs.numel() / 1e9:.2f} GB on {phase_obs.device.type}",
        flush=True,
    )
    if args.e_aux and (rollouts := math.ceil(args.total_timesteps / rollout)) < args.n_pi:
        advice = f"a phase has {args.n_pi} rollouts and this run {rollouts}; --n-pi {rollouts} would bring one"
        print(f"warning: no auxiliary phase will run: {advice}", file=sys.stderr)


def validate(args, typed):
    """End in `fail` where a flag has an impossible value; `typed` holds the flags that were really given."""

    def check(ok, name, problem):
        if not ok:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: {problem}")

    nearest = difflib.get_close_matches(args.env_id.lower(), GAMES, n=1, cutoff=0)[0]
    check(args.env_id in GAMES, "env_id", f"no such game; did you mean {nearest}? There are {', '.join(GAMES)}")
    modes = ("easy", "hard", *GAMES[args.env_id][2])
    check(args.distribution_mode in modes, "distribution_mode", f"no such mode; {args.env_id} has {', '.join(modes)}")
    at_least_one = "num_envs", "num_steps", "total_timesteps", "num_minibatches", "num_aux_minibatches"
    for name in (*at_least_one, "n_pi", "e_pi", "e_v"):
        check(getattr(args, name) >= 1, name, "must be 1 or more")
    for name in ("num_levels", "start_level", "seed", "e_aux", "checkpoint_every"):
        check(0 <= getattr(args, name) < 2**31, name, "must be between 0 and 2147483647")
    for name in ("learning_rate", "aux_learning_rate"):
        check(0 < getattr(args, name) < math.inf, name, "must be more than 0")
    for name in ("clip_coef", "kl_coef", "ent_coef", "beta_clone"):
        check(0 <= getattr(args, name) < math.inf, name, "must be 0 or more")
    for name in ("gamma", "reward_norm_gamma"):
        check(0 < getattr(args, name) <= 1, name, "must be more than 0 and at most 1")
    check(0 <= args.gae_lambda <= 1, "gae_lambda", "must be between 0 and 1")
    for name in ("num_minibatches", "num_aux_minibatches")[: 2 if args.e_aux else 1]:
        fitting = [n for n in range(1, min(getattr(args, name), args.num_envs) + 1) if args.num_envs % n == 0]
        numbers = ", ".join(map(str, fitting))
        hint = f"not a multiple of --{name.replace('_', '-')} {getattr(args, name)}; {numbers} would do"
        check(getattr(args, name) == fitting[-1], "num_envs", hint)
    rollout = args.num_envs * args.num_steps
    check(args.total_timesteps >= rollout, "total_timesteps", f"less than one rollout, which is {rollout} steps")
    check(args.arch == "shared" or "detach_value" not in typed, "detach_value", "only for --arch shared")
    for name in ("num_levels", "start_level") if args.distribution_mode == "exploration" else ():
        check(name not in typed, name, "exploration mode has its own level; leave the flag out")
    check(args.num_levels or not args.start_level, "start_level", "only together with --num-levels")
    check(args.start_level + args.num_levels < 2**31, "start_level", "the levels must end below 2147483648")


if __name__ == "__main__":
    args = parse_args()
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda signum, _: stop(args, signal.Signals(signum).name, 128 + signum))
    threading.excepthook = lambda _: None  # TensorBoard's thread; what fails there is raised in the main thread as well
    try:
        train(args)
    except (OSError, torch.OutOfMemoryError) as error:  # a full disk or GPU
        stop(args, error, 1)
