"""Phasic Policy Gradient (PPG) on Procgen, in one file.

    python ppg_procgen.py --env-id starpilot --arch shared          # one encoder: the faster variant
    python ppg_procgen.py --env-id starpilot                        # the paper's two networks

Paper: Cobbe, Hilton, Klimov, Schulman 2020, "Phasic Policy Gradient", arXiv:2009.04416. "Official" below is the
authors' code, github.com/openai/phasic-policy-gradient at commit 7295473. Algorithm 1 of the paper is `train`. The file
goes flags, networks, environments, math, training; after that comes the plumbing that keeps a run alive.

Where this file departs from the official code, or the paper is silent:
1. A single network (--arch shared) detaches its value head from the features in the policy phase only; the auxiliary
   phase takes the full value gradient, as section 3.6 says. Official: detached there too (--detach-value always).
2. Policy and value epochs (E_pi, E_V) run side by side in one loop with one Adam. The official code runs them one after
   the other with an Adam each when they differ. With two networks that is the same: no gradient, no step.
3. The step count is reached, rounded up to a rollout, and an auxiliary phase follows every complete policy phase. The
   official code skips the last one.
4. The auxiliary phase computes in bfloat16 where the hardware has it (--precision), and on a CPU a minibatch goes
   through in chunks that fit the cache, which add up to the same gradient.
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
import math
import os
import platform
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path


def fail(message):
    """End with exit status 2 and one line on stderr: what is wrong, and what would be right."""
    print(f"ppg_procgen.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


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
MODES = ("easy", "hard", "extreme", "memory", "exploration")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def count(text):
    """A whole number: 64, 25_000_000 or 25e6."""
    try:
        return int(text)
    except ValueError:
        if not (value := float(text)).is_integer():
            raise ValueError(text) from None
        return int(value)


def parse_args(argv=None):
    """Flags -> Namespace. Wrong ones end in `fail`."""
    parser = Parser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    # environment
    flag("--env-id", default="starpilot", help="one of the 16 Procgen games")
    flag("--distribution-mode", default="easy", help="|".join(MODES) + ", where the game has it (paper: hard)")
    flag("--num-levels", type=count, default=0, help="number of training levels, 0 = all (paper: 0)")
    flag("--start-level", type=count, default=0, help="first training level, with --num-levels only")
    flag("--num-envs", type=count, default=64, help="environments that step together (paper: 256)")
    flag("--num-steps", type=count, default=256, help="steps of each environment per rollout (paper: 256)")
    flag("--total-timesteps", type=count, default=25_000_000, help="environment steps in all (paper: 100e6)")
    flag("--seed", type=count, default=1, help="seed of torch, numpy and Procgen")
    # networks
    flag("--arch", default="dual", choices=("dual", "shared"), help="two networks, or one (paper: dual)")
    detach = (
        "phases in which the shared encoder gets no value gradient (paper: policy, official code: always, PPO: never)"
    )
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
    flag("--num-aux-minibatches", type=count, default=16, help="minibatches per epoch and rollout (paper: 16)")
    flag("--aux-learning-rate", type=float, default=5e-4, help="Adam's step size, auxiliary phase (paper: 5e-4)")
    # machine and output
    flag("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto = cuda where there is one")
    precision = "everywhere; auto = fp32 (CUDA: TF32) in the policy phase, bf16 in the auxiliary phase if in hardware"
    flag("--precision", default="auto", choices=("auto", "fp32", "bf16"), help=precision)
    flag("--exp-name", default="ppg_procgen", help="part of the default run directory")
    flag("--run-dir", help="where all is written; None = runs/{env_id}__{exp_name}__{seed}__{time}")
    defaults = vars(parser.parse_args([]))
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, parser))))
    typed = {name: value for name, value in typed.items() if value is not parser}  # what the user really gave
    args = argparse.Namespace(**{**defaults, **typed})
    validate(args, typed)
    return args


# ------------------------------------------------------------------------------------------------------------- networks


def normed(layer, norm):
    """Scale each output row or filter of a layer to this L2 norm, biases to 0 (official torch_util.py)."""
    with torch.no_grad():
        layer.weight *= norm / layer.weight.flatten(1).norm(dim=1).view(-1, *[1] * (layer.weight.dim() - 1))
        layer.bias.zero_()
    return layer


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        norm = (3**-0.5 * 2**-0.5) ** 0.5  # 3 stacks of 2 blocks of 2 convs: depth must not blow up the features
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
        # exploration mode brings a level of its own and takes neither of the two
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


def make_envs(args):
    """The function to change for another environment: any gym vector env of uint8 images [H, W, C] and a Discrete."""
    levels = args.distribution_mode, args.num_levels, args.start_level
    return ProcgenVectorEnv(args.env_id, args.num_envs, *levels, args.seed, num_threads=len(os.sched_getaffinity(0)))


class EpisodeStatistics:
    """Undiscounted returns and lengths of all episodes that end, from the raw rewards."""

    def __init__(self, num_envs):
        self.returns = np.zeros(num_envs)  # of the episodes under way
        self.lengths = np.zeros(num_envs, dtype=np.int64)
        self.ended = []  # (return, length) of every episode that ended in this rollout
        self.recent = deque(maxlen=100)  # returns of the last 100 episodes

    def update(self, rewards, dones):
        self.returns += rewards
        self.lengths += 1
        for i in np.flatnonzero(dones):
            self.ended.append((float(self.returns[i]), int(self.lengths[i])))
            self.recent.append(float(self.returns[i]))
            self.returns[i] = self.lengths[i] = 0


class RewardNormalizer:
    """Divides rewards by the running standard deviation of the discounted return, then clips them to +-10.

    The moments take in the whole rollout before it is divided (official reward_normalizer.py, RewardNormalizer).
    """

    def __init__(self, num_envs, gamma):
        self.gamma = gamma
        self.discounted = np.zeros(num_envs)  # discounted sum of the rewards so far, 0 where an episode begins
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, rewards, dones):
        """rewards, dones (dones[:, t]: step t ended an episode): [N, T] -> normalised rewards [N, T]."""
        sums = np.empty(rewards.shape)
        for t in range(rewards.shape[1]):
            sums[:, t] = self.discounted = self.gamma * self.discounted + rewards[:, t]
            self.discounted = self.discounted * (1 - dones[:, t])
        total, delta = self.count + sums.size, sums.mean() - self.mean
        self.var = (self.var * self.count + sums.var() * sums.size + delta**2 * self.count * sums.size / total) / total
        self.mean, self.count = self.mean + delta * sums.size / total, total
        return np.clip(rewards / np.sqrt(self.var + 1e-8), -10, 10)


# ----------------------------------------------------------------------------------------------------------------- math


def compute_gae(rewards, values, dones, gamma, gae_lambda):
    """Generalised advantage estimation (arXiv:1506.02438).

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
    """-L^clip, plus kl_coef times the KL estimate 1/2 (log ratio)^2; all [B] -> scalar. clip_coef 0: no clipping."""
    ratio = log_ratio.exp()
    surrogate = -advantages * ratio
    if clip_coef > 0:
        surrogate = torch.maximum(surrogate, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))
    return surrogate.mean() + kl_coef * 0.5 * log_ratio.square().mean()


def value_loss(values, targets):
    """1/2 (V - V^targ)^2, unclipped; [B] -> scalar."""
    return 0.5 * (values - targets).square().mean()


def kl_divergence(old_logits, new_logits):
    """KL[pi_old, pi] in nats, mean over the batch; logits [B, A] -> scalar. Exactly 0 for equal logits."""
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

    -> loss, its parts [5]: policy loss, entropy, approximate KL, clipped fraction, value loss.
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
        approx_kl = (ratio - 1 - log_ratio).mean()
        clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
        loss, parts[:4] = pi_loss - args.ent_coef * entropy, (pi_loss, entropy, approx_kl, clipfrac)
    if train_value:
        parts[4] = value_loss(values, targets)
        loss = loss + parts[4]
    return loss, torch.stack(parts).detach()


def auxiliary_phase_loss(agent, args, bf16, batch):
    """Losses of Algorithm 1's auxiliary phase, L^joint + L^value, on a flat batch (obs, pi_old's logits, targets).

    -> loss, its parts [3]: KL, auxiliary value loss, true value loss.
    """
    obs, old_logits, targets = batch
    logits, aux_values, values = agent(obs, bf16, detach_value=args.detach_value == "always")
    parts = kl_divergence(old_logits, logits), value_loss(aux_values, targets), value_loss(values, targets)
    kl, aux_value_loss, real_value_loss = parts
    loss = aux_value_loss + args.beta_clone * kl + real_value_loss  # L^joint = L^aux + beta_clone * KL[pi_old, pi]
    return loss, torch.stack(parts).detach()


def minibatches(num_segments, size, epochs):
    """Yield (epoch, rows) with `size` segment indices each: every epoch a new permutation of all segments."""
    for epoch in range(epochs):
        for rows in torch.randperm(num_segments).split(size):
            yield epoch, rows.tolist()


def gather(rows, device, *tensors):
    """Rows of [S, T, ...] tensors -> flat batches [len(rows) * T, ...] on the device."""
    return [torch.stack([x[row].to(device, non_blocking=True) for row in rows]).flatten(0, 1) for x in tensors]


def train_minibatch(optimizer, loss_of, data, rows, chunk_size, device):
    """One optimizer step on segments `rows` of the data ([S, T, ...] tensors); loss_of(batch) -> loss, parts. -> parts.

    The minibatch goes through in chunks of segments that fit the cache; their gradients add up to that of the whole.
    A parameter that no loss reaches keeps grad None, so that Adam leaves it alone; at a zero gradient it would move it.
    """
    optimizer.zero_grad()
    mean_parts = 0.0
    for chunk in (rows[i : i + chunk_size] for i in range(0, len(rows), chunk_size)):
        loss, parts = loss_of(gather(chunk, device, *data))
        (loss * (len(chunk) / len(rows))).backward()
        mean_parts += parts * (len(chunk) / len(rows))
    optimizer.step()
    return mean_parts


# ------------------------------------------------------------------------------------------------------------- training


def train(args):
    """Algorithm 1 of the paper -> the trained Agent. Writes TensorBoard files and agent.pt into the run directory."""
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    device, policy_bf16, aux_bf16 = choose_device(args)
    envs = make_envs(args)
    N, T, image = args.num_envs, args.num_steps, envs.single_observation_space.shape
    num_iterations = math.ceil(args.total_timesteps / (N * T))
    has_aux_phase = args.e_aux > 0 and num_iterations >= args.n_pi
    agent = Agent(image, int(envs.single_action_space.n), args.arch).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    aux_optimizer = torch.optim.Adam(agent.parameters(), lr=args.aux_learning_rate, fused=True)

    # The phase buffer B of S segments, filled in place by the rollouts. Without auxiliary phase it keeps one rollout.
    S = N * (args.n_pi if has_aux_phase else 1)
    phase_obs = allocate_observations((S, T, *image), N, device)
    phase_targets = torch.zeros(S, T, device=device)
    actions = torch.zeros(N, T, dtype=torch.int64, device=device)
    logprobs, values = torch.zeros(N, T, device=device), torch.zeros(N, T + 1, device=device)
    rewards, dones = np.zeros((N, T), np.float32), np.zeros((N, T), np.float32)
    # Segments per pass through the network: the minibatch on a GPU; on a CPU what fits the cache, 256 observations.
    chunk_size = S if device.type == "cuda" else max(1, 256 // T)

    run_dir = make_run_dir(args)
    announce(args, agent, phase_obs, device, policy_bf16, aux_bf16)
    writer = SummaryWriter(run_dir)
    writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
    episodes, normalize = EpisodeStatistics(N), RewardNormalizer(N, args.reward_norm_gamma)
    progress = Progress(num_iterations * N * T, has_aux_phase)
    next_obs, _ = envs.reset()
    global_step = iteration = 0

    for phase in range(1, math.ceil(num_iterations / args.n_pi) + 1):
        # ---- Policy phase (Alg. 1): N_pi iterations of rollout and update; the last phase may be shorter ----
        for i in range(min(args.n_pi, num_iterations - iteration)):
            # Roll out the current policy.
            segments = slice(i * N, (i + 1) * N) if has_aux_phase else slice(N)
            obs, episodes.ended = phase_obs[segments], []
            for t in range(T):
                obs[:, t].copy_(torch.from_numpy(next_obs))
                actions[:, t], logprobs[:, t], values[:, t] = act(agent, obs[:, t].to(device), policy_bf16)
                envs.step_async(actions[:, t].cpu().numpy())  # sync: one a step
                next_obs, rewards[:, t], terminated, truncated, _ = envs.step_wait()
                dones[:, t] = terminated | truncated
                episodes.update(rewards[:, t], dones[:, t])
            values[:, T] = act(agent, torch.from_numpy(next_obs).to(device), policy_bf16)[2]  # for GAE; not a step
            global_step, iteration = global_step + N * T, iteration + 1
            rollout_seconds = progress.lap("rollout")

            # V^targ, A <- GAE, on the host: T small operations in a row. A is normalised over the full batch.
            values_on_host = values.cpu()
            scaled_rewards = torch.from_numpy(normalize(rewards, dones)).float()
            ended = torch.from_numpy(dones)
            advantages, targets = compute_gae(scaled_rewards, values_on_host, ended, args.gamma, args.gae_lambda)
            unexplained = (targets - values_on_host[:, :-1]).var() / targets.var()
            advantages = ((advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)).to(device)
            phase_targets[segments] = targets.to(device)  # B += (s, V^targ); s is in place already

            # E_pi epochs of -L^clip - beta_S * entropy w.r.t. theta_pi, E_V epochs of L^value w.r.t. theta_V.
            parts, data = torch.zeros(5, device=device), (obs, actions, logprobs, advantages, phase_targets[segments])
            for epoch, rows in minibatches(N, N // args.num_minibatches, max(args.e_pi, args.e_v)):
                loss_of = partial(policy_phase_loss, agent, args, policy_bf16, epoch < args.e_pi, epoch < args.e_v)
                parts += train_minibatch(optimizer, loss_of, data, rows, chunk_size, device)
            parts = (parts / args.num_minibatches).tolist()  # sync: one an iteration
            policy_seconds = progress.lap("policy_phase")

            scalars = {
                "losses/policy_loss": parts[0] / args.e_pi,
                "losses/entropy": parts[1] / args.e_pi,
                "losses/approx_kl": parts[2] / args.e_pi,
                "losses/clipfrac": parts[3] / args.e_pi,
                "losses/value_loss": parts[4] / args.e_v,
            }
            check_finite(scalars, f"the policy phase at step {global_step}")
            scalars |= {
                "losses/explained_variance": 1 - unexplained.item(),
                "charts/learning_rate": args.learning_rate,
                "charts/SPS": progress.rate(global_step),
                "time/rollout": rollout_seconds,
                "time/policy_phase": policy_seconds,
                **episode_scalars(args, episodes),
            }
            if args.clip_coef == 0:
                del scalars["losses/clipfrac"]
            for name, value in scalars.items():
                writer.add_scalar(name, value, global_step)
            progress.print_iteration(global_step, scalars, episodes)

        if has_aux_phase and iteration == phase * args.n_pi:
            # ---- Auxiliary phase (Alg. 1) ----
            # pi_old(.|s) for all of B, in the precision and the chunks of the epochs: their first KL is exactly 0.
            aux_size = N // args.num_aux_minibatches  # segments in a minibatch; chunks divide it evenly
            aux_chunk_size = max(n for n in range(1, chunk_size + 1) if aux_size % n == 0)
            chunks = (range(row, row + aux_chunk_size) for row in range(0, S, aux_chunk_size))
            with torch.no_grad():
                old_logits = [agent(*gather(rows, device, phase_obs), aux_bf16, value=False)[0] for rows in chunks]
            data = phase_obs, torch.cat(old_logits).view(S, T, -1), phase_targets

            # E_aux epochs of L^joint w.r.t. theta_pi and L^value w.r.t. theta_V.
            parts, steps_per_epoch = torch.zeros(args.e_aux, 3, device=device), S // aux_size
            loss_of = partial(auxiliary_phase_loss, agent, args, aux_bf16)
            for k, (epoch, rows) in enumerate(minibatches(S, aux_size, args.e_aux)):
                parts[epoch] += train_minibatch(aux_optimizer, loss_of, data, rows, aux_chunk_size, device)
                progress.print_auxiliary(phase, epoch, k % steps_per_epoch + 1, steps_per_epoch, parts)
            last_epoch = (parts[-1] / steps_per_epoch).tolist()
            scalars = dict(zip(AUX_TAGS, last_epoch)) | {"time/auxiliary_phase": progress.lap("auxiliary_phase")}
            check_finite(scalars, f"the auxiliary phase at step {global_step}")
            for name, value in scalars.items():
                writer.add_scalar(name, value, global_step)

        # ---- Phase boundary: the buffer is empty ----
        progress.end_phase(global_step)
        weights = {"args": vars(args), "image": image, "global_step": global_step, "agent": agent.state_dict()}
        save(run_dir / "agent.pt", weights)
        writer.flush()
    progress.print_summary(run_dir)
    writer.close()
    envs.close()
    return agent


# ------------------------------------------------------------------------------------- plumbing: metrics, files, device

AUX_TAGS = ("losses/aux/kl_loss", "losses/aux/aux_value_loss", "losses/aux/real_value_loss")


def episode_scalars(args, episodes):
    """Means over all episodes that ended in this rollout; nothing where none did."""
    if not episodes.ended:
        return {}
    mean_return, mean_length = np.mean(episodes.ended, axis=0)
    scalars = {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
    easy, hard, _ = GAMES[args.env_id]
    if args.distribution_mode in ("easy", "hard"):  # the other modes have no published range
        low, high = easy if args.distribution_mode == "easy" else hard
        scalars["charts/normalized_return"] = (mean_return - low) / (high - low)
    return scalars


def check_finite(scalars, where):
    """Stop the run, exit status 1, at a number that is none: agent.pt stays that of the last phase."""
    for name, value in scalars.items():
        if not math.isfinite(value):
            raise SystemExit(f"ppg_procgen.py: stopped: {name} is {value} in {where}; a smaller learning rate may help")


def save(path, data):
    """torch.save through a temporary file, so that `path` is always complete."""
    torch.save(data, partial := path.with_suffix(".partial"))
    os.replace(partial, path)


def load_agent(path, device="cpu"):
    """agent.pt of a run -> the Agent, the run's flags as a Namespace."""
    saved = torch.load(path, map_location=device, weights_only=True)
    args, weights = argparse.Namespace(**saved["args"]), saved["agent"]
    agent = Agent(saved["image"], len(weights["policy_head.bias"]), args.arch).to(device)
    agent.load_state_dict(weights)
    return agent, args


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


class Progress:
    """Times, rates and the console."""

    def __init__(self, total_steps, learns_in_phases):
        self.total, self.learns_in_phases = total_steps, learns_in_phases
        self.seconds = dict.fromkeys(("rollout", "policy_phase", "auxiliary_phase"), 0.0)
        self.start = self.lap_start = self.phase_start = self.last_line = time.perf_counter()
        self.phase_step, self.phases = 0, []  # (environment steps, seconds) of each phase that is over

    def lap(self, part):
        """Book the time since the last lap to this part of the algorithm -> seconds."""
        seconds, self.lap_start = time.perf_counter() - self.lap_start, time.perf_counter()
        self.seconds[part] += seconds
        return seconds

    def rate(self, step):
        """Environment steps/s over the last whole phase; since the start, before the first is over."""
        steps, seconds = self.phases[-1] if self.phases else (step, time.perf_counter() - self.start)
        return steps / seconds

    def end_phase(self, step):
        now = time.perf_counter()
        self.phases.append((step - self.phase_step, now - self.phase_start))
        self.phase_step, self.phase_start, self.lap_start = step, now, now

    def print_iteration(self, step, scalars, episodes):
        rate = self.rate(step)
        # within the first phase the time of its auxiliary phase is not known yet
        left = duration((self.total - step) / rate) if self.phases or not self.learns_in_phases else "?"
        recent = f"{np.mean(episodes.recent):.2f}" if episodes.recent else "-"
        print(
            f"step {step:,}/{self.total:,} {step / self.total:.1%} | return {recent} (n={len(episodes.ended)})"
            f" | kl {scalars['losses/approx_kl']:.4f} | ev {scalars['losses/explained_variance']:.2f}"
            f" | {rate:,.0f} steps/s | left {left}",
            flush=True,
        )

    def print_auxiliary(self, phase, epoch, k, steps_per_epoch, parts):
        """A line at the end of each epoch and once a minute; reading `parts` waits for the GPU."""
        if k == steps_per_epoch or time.perf_counter() - self.last_line > 60:
            self.last_line = time.perf_counter()
            done = (epoch * steps_per_epoch + k) / (len(parts) * steps_per_epoch)
            left = (self.last_line - self.lap_start) * (1 - done) / done
            kl, aux_value_loss, real_value_loss = (parts[epoch] / k).tolist()
            print(
                f"  auxiliary phase {phase}, epoch {epoch + 1}/{len(parts)} {done:.0%} | kl {kl:.4f}"
                f" | aux value loss {aux_value_loss:.4f} | value loss {real_value_loss:.4f} | left {duration(left)}",
                flush=True,
            )

    def print_summary(self, run_dir):
        wall = time.perf_counter() - self.start
        steps, seconds = np.sum(self.phases[1:] or self.phases, axis=0)
        shares = ", ".join(f"{part.replace('_', ' ')} {t / wall:.0%}" for part, t in self.seconds.items())
        which = f"phases 2 to {len(self.phases)}" if len(self.phases) > 1 else "the only phase"
        rate = f"{steps / seconds:,.0f} steps/s over {which}"
        print(f"done in {duration(wall)} | {rate} | {shares} | {run_dir / 'agent.pt'}", flush=True)


def make_run_dir(args):
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.run_dir or Path("runs") / name)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
    except OSError as error:
        fail(f"cannot write into the run directory {run_dir}: {error.strerror}")
    if held := [*run_dir.glob("*.pt"), *run_dir.glob("events.out.*")]:
        fail(f"{run_dir} already holds a run ({held[0].name}): choose another --run-dir")
    return run_dir


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
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if args.precision == "fp32" else "high")  # high: TF32
        torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    else:
        # glibc gives large freed blocks back to the kernel and every minibatch faults them in again. Keeping them makes
        # training passes 1.7x to 2.2x as fast.
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 2**30), libc.mallopt(m_trim_threshold, 2**31 - 1)
    return device, args.precision == "bf16", args.precision == "bf16" or (args.precision == "auto" and has_bf16(device))


def free_memory(root="/"):
    """Bytes still to be had: MemAvailable, or what a cgroup (v1 or v2) leaves below its limit where that is less."""
    system = Path(root) / "sys/fs/cgroup"
    meminfo = dict(line.split(":") for line in Path(root, "proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    for line in Path(root, "proc/self/cgroup").read_text().splitlines():
        _, controller, path = line.split(":", 2)
        base, limit, use = system / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        if controller == "":  # version 2
            base, limit, use = system, "memory.max", "memory.current"
        group = base / path.lstrip("/")
        for folder in (group, *group.parents) if controller in ("", "memory") else ():  # any ancestor's limit counts
            with contextlib.suppress(OSError, ValueError):  # a container does not see all of them; "max" is no limit
                free = min(free, int((folder / limit).read_text()) - int((folder / use).read_text()))
    return free


def allocate_observations(shape, segments_per_rollout, device):
    """The phase buffer, uint8 [S, T, H, W, C]: on the GPU where it fits, else pinned; an error if it fits nowhere."""
    needed, working = math.prod(shape), 1_500_000_000
    if device.type == "cuda" and needed + 8e9 < torch.cuda.mem_get_info()[0]:
        return torch.empty(shape, dtype=torch.uint8, device=device)
    if needed + working > (free := free_memory()):
        fits = int((free - working) / (needed / shape[0] * segments_per_rollout))
        advice = f"--n-pi {fits} is the largest that fits" if fits > 0 else "take fewer --num-envs or --num-steps"
        fail(f"the phase buffer takes {needed:,} bytes, training {working:,} more, and {free:,} are free: {advice}")
    return torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")


def announce(args, agent, phase_obs, device, policy_bf16, aux_bf16):
    """The first line of output, and a warning where no auxiliary phase will run."""
    levels = f"{args.num_levels} levels from {args.start_level}" if args.num_levels else "all levels"
    levels = "its own level" if args.distribution_mode == "exploration" else levels
    names = ["TF32" if device.type == "cuda" and args.precision != "fp32" else "fp32", "bf16"]
    missing = " (no bf16 in hardware)" if args.precision == "auto" and not aux_bf16 else ""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    rollout = args.num_envs * args.num_steps
    print(
        f"{args.env_id} {args.distribution_mode}, {levels} | {args.arch}, "
        f"{sum(p.numel() for p in agent.parameters()):,} parameters | {args.num_envs} environments x {args.num_steps} "
        f"steps | {device.type} ({hardware}), policy phase {names[policy_bf16]}, auxiliary phase {names[aux_bf16]}"
        f"{missing} | {args.n_pi * rollout:,} steps per phase | phase buffer {phase_obs.numel() / 1e9:.2f} GB",
        flush=True,
    )
    if args.e_aux and (rollouts := math.ceil(args.total_timesteps / rollout)) < args.n_pi:
        advice = f"a phase has {args.n_pi} rollouts and this run {rollouts}; --n-pi {rollouts} would bring one"
        print(f"warning: no auxiliary phase will run: {advice}", file=sys.stderr)


def validate(args, typed):
    """End in `fail` where a flag cannot be meant; `typed` holds the flags that were really given."""

    def check(ok, name, problem):
        if not ok:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: {problem}")

    nearest = difflib.get_close_matches(args.env_id.lower(), GAMES, n=1, cutoff=0)[0]
    check(args.env_id in GAMES, "env_id", f"no such game; did you mean {nearest}? There are {', '.join(GAMES)}")
    modes = ("easy", "hard", *GAMES[args.env_id][2])
    check(args.distribution_mode in modes, "distribution_mode", f"{args.env_id} has {', '.join(modes)}")
    for name in ("num_envs", "num_steps", "total_timesteps", "num_minibatches", "n_pi", "e_pi", "e_v"):
        check(getattr(args, name) >= 1, name, "must be 1 or more")
    for name in ("num_levels", "start_level", "seed", "e_aux"):
        check(0 <= getattr(args, name) < 2**31, name, "must be between 0 and 2147483647")
    for name in ("learning_rate", "aux_learning_rate"):
        check(0 < getattr(args, name) < math.inf, name, "must be more than 0")
    for name in ("clip_coef", "kl_coef", "ent_coef", "beta_clone"):
        check(0 <= getattr(args, name) < math.inf, name, "must be 0 or more")
    for name in ("gamma", "reward_norm_gamma"):
        check(0 < getattr(args, name) <= 1, name, "must be more than 0 and at most 1")
    check(0 <= args.gae_lambda <= 1, "gae_lambda", "must be between 0 and 1")
    divisors = [n for n in range(1, args.num_envs + 1) if args.num_envs % n == 0]
    for name in ("num_minibatches", "num_aux_minibatches")[: 2 if args.e_aux else 1]:
        check(getattr(args, name) in divisors, name, f"must divide --num-envs {args.num_envs}: one of {divisors}")
    rollout = args.num_envs * args.num_steps
    check(args.total_timesteps >= rollout, "total_timesteps", f"less than one rollout, which is {rollout} steps")
    check(args.arch == "shared" or "detach_value" not in typed, "detach_value", "only for --arch shared")
    if args.distribution_mode == "exploration":
        for name in ("num_levels", "start_level"):
            check(name not in typed, name, "exploration mode has its own level; leave the flag out")
    check(args.num_levels or not args.start_level, "start_level", "only together with --num-levels")
    check(args.start_level + args.num_levels < 2**31, "start_level", "the levels must end below 2147483648")


if __name__ == "__main__":
    train(parse_args())
