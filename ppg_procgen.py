"""Phasic Policy Gradient (PPG) on Procgen, in one file.

    python ppg_procgen.py --env-id starpilot --arch shared --n-pi 8 # one encoder, short phases: the one to begin with
    python ppg_procgen.py --env-id starpilot                        # the paper's two networks
    python ppg_procgen.py --resume RUN_DIR                          # continue a run that was stopped
    torchrun --nproc-per-node 4 ppg_procgen.py --num-envs 256       # several processes, on one machine or more
    python ppg_procgen.py --evaluate 200 --agent RUN_DIR/agent.pt   # how well a trained agent plays

Paper: Cobbe, Hilton, Klimov, Schulman 2020, "Phasic Policy Gradient", arXiv:2009.04416. "Official" below is the
authors' code, github.com/openai/phasic-policy-gradient at commit 7295473. Its Algorithm 1 is `train`. In brief:

    for each phase:
        for N_pi iterations:                                                                  the policy phase
            roll out the policy; advantages A and value targets V^targ by GAE
            E_pi epochs: maximise L^clip + beta_S * entropy  w.r.t. theta_pi
            E_V epochs: minimise L^value = 1/2 (V - V^targ)^2  w.r.t. theta_V
            B += (s, V^targ)
        pi_old <- pi on every s of B                                                          the auxiliary phase
        E_aux epochs: minimise L^joint = 1/2 (V_aux - V^targ)^2 + beta_clone * KL[pi_old, pi]  w.r.t. theta_pi
                      and L^value  w.r.t. theta_V

theta_pi is the policy network, with a value head V_aux of its own, theta_V the value network, B a buffer of the phase.

Why: what the value function learns about a state serves the policy too, but trained together the two losses pull at
the same features and must reuse samples equally often, though the policy does best with about one pass over them and
the value function, a regression, profits from more (paper, "Policy Sample Reuse", "Value Sample Reuse"). So the policy
phase keeps them apart, and the auxiliary phase brings the value function's features into the policy network, in several
epochs, while the KL term holds what pi does.

The lesson comes first: flags, networks, environments, math, `train`. What keeps a run alive and fast follows.

Where this file departs from the official code, or the paper is silent:
1. A single network (--arch shared) detaches its value head from the features in the policy phase only; the auxiliary
   phase takes the full value gradient, as section 3.6 says. Official: detached there too (--detach-value always).
2. Policy and value epochs (E_pi, E_V) run side by side in one loop with one Adam. The official code runs them one after
   the other with an Adam each when they differ. With two networks that is the same, as a network whose epochs are over
   has no gradient and is not stepped. With one, the epochs by which E_V exceeds E_pi train the value head alone
   (--detach-value never: the encoder too).
3. Minibatches of the policy phase are drawn from single transitions, those of the auxiliary phase from whole segments.
   The official code draws segments in both, 8 from each of its 4 workers. With 64 environments a minibatch would have
   8 in all, too few, since the steps of a segment are alike (measured: results/README.md).
4. The step count is reached, rounded up to a rollout, and an auxiliary phase follows every complete policy phase. The
   official code skips the last one.
5. The auxiliary phase computes in bfloat16 where the hardware has it, and convolutions on CUDA in TF32 (--precision).
6. Defaults are easy levels, 64 environments and 25 M steps. The paper: --distribution-mode hard --num-envs 256
   --total-timesteps 100_000_000.

Shapes: N environments, T steps per rollout, S = N_pi * N segments in the phase buffer, A actions, [B] a flat batch.
A segment is the T steps of one environment in one rollout: a row of every [N, T] and [S, T] tensor.
"""

import argparse
import contextlib
import ctypes
import difflib
import errno
import fcntl
import hashlib
import io
import math
import os
import pickle
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from Ctrl-C during the imports, which take seconds
# OpenMP's threads wait in a spin, by default so long that two runs on the same cores stop each other (README, "Speed").
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
from gym_notices import notices
from torch import distributed as dist
from torch import nn
from torch.utils.tensorboard import SummaryWriter

notices.notices.clear()  # `import gym` would print four lines about its end of life to stderr; gym 0.26.2 is pinned
warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # by the video writer that gym3 pins
import gym
from gym3 import VideoRecorderWrapper
from procgen import ProcgenGym3Env

# Which process this is, of how many, in all and on this machine: from torchrun, without it 0 of 1.
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK, LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
LIBC = ctypes.CDLL("libc.so.6")


# ---------------------------------------------------------------------------------------------------------------- flags
def parse_args(argv=None):
    """Flags -> Namespace. Wrong ones end the program with exit status 2 and one line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, flag, switch = fail, parser.add_argument, argparse.BooleanOptionalAction
    # environment
    flag("--env-id", default="starpilot", help="one of the 16 Procgen games")
    flag("--distribution-mode", default="easy", help="easy, hard, or what else the game has (paper: hard)")
    flag("--num-levels", type=UINT, default=0, help="number of training levels, 0 = all (paper: 0)")
    flag("--start-level", type=UINT, default=0, help="first training level, with --num-levels only")
    flag("--num-envs", type=COUNT, default=64, help="environments of all processes (paper: 256)")
    flag("--num-steps", type=COUNT, default=256, help="steps of each environment per rollout (paper: 256)")
    flag("--total-timesteps", type=COUNT, default=25_000_000, help="environment steps of all processes (paper: 100e6)")
    flag("--seed", type=UINT, default=1, help="seed of torch, numpy and Procgen")
    # networks
    flag("--arch", default="dual", choices=("dual", "shared"), help="two networks, or one (paper: dual)")
    detach = "phases without value gradient into the shared encoder (paper: policy, official: always, PPO: never)"
    flag("--detach-value", default="policy", choices=("policy", "always", "never"), help=detach)
    # policy phase
    flag("--learning-rate", type=POSITIVE, default=5e-4, help="Adam's step size, policy phase (paper: 5e-4)")
    flag("--gamma", type=DISCOUNT, default=0.999, help="discount of the return (paper: 0.999)")
    flag("--gae-lambda", type=FRACTION, default=0.95, help="lambda of advantage estimation (paper: 0.95)")
    flag("--reward-norm-gamma", type=DISCOUNT, default=0.99, help="discount in reward normalisation (official: 0.99)")
    flag("--num-minibatches", type=COUNT, default=8, help="minibatches per policy-phase epoch (paper: 8)")
    flag("--clip-coef", type=WEIGHT, default=0.2, help="clip range of the ratio, 0 = no clipping (paper: 0.2)")
    flag("--kl-coef", type=WEIGHT, default=0.0, help="weight of 1/2 (log ratio)^2 (paper: 0; PPG-KL: 1, unclipped)")
    flag("--ent-coef", type=WEIGHT, default=0.01, help="weight of the entropy bonus, beta_S (paper: 0.01)")
    flag("--n-pi", type=COUNT, default=32, help="rollouts per phase, N_pi (paper: 32)")
    flag("--e-pi", type=COUNT, default=1, help="policy epochs per rollout, E_pi (paper: 1; PPO: 3)")
    flag("--e-v", type=COUNT, default=1, help="value epochs per rollout, E_V (paper: 1; PPO: 3)")
    # auxiliary phase
    flag("--e-aux", type=UINT, default=6, help="auxiliary epochs per phase, E_aux, 0 = none (paper: 6; PPO: 0)")
    flag("--beta-clone", type=WEIGHT, default=1.0, help="weight of KL[pi_old, pi] (paper: 1)")
    flag("--num-aux-minibatches", type=COUNT, default=16, help="minibatches per rollout, auxiliary phase (paper: 16)")
    flag("--aux-learning-rate", type=POSITIVE, default=5e-4, help="Adam's step size, auxiliary phase (paper: 5e-4)")
    # evaluation
    flag("--eval-episodes", type=UINT, default=0, help="episodes on held-out levels after each phase, 0 = none")
    flag("--capture-video", action=switch, default=False, help="record an episode of each evaluation, 512 x 512")
    flag("--evaluate", type=COUNT, metavar="K", help="play K episodes with the agent of --agent, and exit")
    flag("--agent", metavar="PATH", help="the agent.pt to --evaluate")
    # machine and output
    flag("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto = cuda where there is one")
    precision = "fp32, bf16: everywhere; auto = bf16 in the auxiliary phase only, where the hardware has it"
    flag("--precision", default="auto", choices=("auto", "fp32", "bf16"), help=precision)
    flag("--compile", action=switch, default=False, help="torch.compile the encoders")
    flag("--exp-name", default=Path(__file__).stem, help="part of the default run directory")
    flag("--run-dir", help="where all is written; None = runs/{env_id}__{exp_name}__{seed}__{time}")
    flag("--resume", metavar="RUN_DIR", help="continue that run from its last checkpoint, with its flags")
    flag("--checkpoint-every", type=UINT, default=1, help="phases from checkpoint to checkpoint, 0 = none at all")
    return check_flags(parser, argv)


# ------------------------------------------------------------------------------------------------------------- networks
def normed(layer, norm):
    """Scale each output row or filter of a layer to this L2 norm, biases to 0 (official torch_util.py).

    The initial scale of a layer's output then does not depend on its number of inputs; a head's 0.1 makes the first
    policy nearly uniform and the first values nearly 0.
    """
    with torch.no_grad():
        rows = layer.weight.flatten(1)  # a view
        rows *= norm / rows.norm(dim=1, keepdim=True)
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
        x = obs.permute(0, 3, 1, 2).to(torch.bfloat16 if bf16 else self.dense.weight.dtype) / 255
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=bf16):
            features = F.relu(self.dense(F.relu(self.stacks(x)).flatten(1)))  # flattened as (c, h, w)
        # The heads stay fp32 in every precision: their outputs enter ratios and KLs.
        return features.to(self.dense.weight.dtype)


class Agent(nn.Module):
    """theta_pi = policy_encoder, policy_head, aux_value_head; theta_V = value_encoder, value_head.
    With arch "shared" there is no value_encoder: all three heads stand on the policy encoder (paper, section 3.6)."""

    def __init__(self, observation_shape, num_actions, arch):
        super().__init__()
        self.policy_encoder = ImpalaEncoder(observation_shape)
        width = self.policy_encoder.dense.out_features
        self.policy_head = normed(nn.Linear(width, num_actions), 0.1)
        self.aux_value_head = normed(nn.Linear(width, 1), 0.1)
        self.value_encoder = ImpalaEncoder(observation_shape) if arch == "dual" else None
        self.value_head = normed(nn.Linear(width, 1), 0.1)

    def forward(self, obs, bf16=False, detach_value=False):
        """uint8 [B, H, W, C] -> logits [B, A], auxiliary values [B], values [B]; `detach_value`: no value gradient into
        shared features."""
        features = self.policy_encoder(obs, bf16)
        logits, aux_value = self.policy_head(features), self.aux_value_head(features).squeeze(-1)
        if self.value_encoder:
            features = self.value_encoder(obs, bf16)
        elif detach_value:
            features = features.detach()
        return logits, aux_value, self.value_head(features).squeeze(-1)


# --------------------------------------------------------------------------------------------------------- environments
class ProcgenVectorEnv:
    """Procgen with the methods of gym's vector environments: uint8 images [N, 64, 64, 3], reset within the same step.
    An episode that meets Procgen's time limit is `terminated` too: Procgen does not tell the two apart."""

    def __init__(self, env_id, num_envs, seed, **options):
        threads = max(1, len(os.sched_getaffinity(0)) // LOCAL_WORLD_SIZE)
        self.procgen = ProcgenGym3Env(num_envs, env_id, rand_seed=seed, num_threads=threads, **options)
        self.num_envs, self.close = num_envs, self.procgen.close
        self.fresh = True  # not reset yet: the observations begin episodes
        self.single_observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.single_action_space = gym.spaces.Discrete(15)
        self.return_range = GAMES[env_id][options["distribution_mode"]]

    def reset(self):
        """-> observations, {}."""
        if not self.fresh:
            self.procgen.act(np.full(self.num_envs, -1))  # Procgen's action -1 ends the episode
        self.fresh = False
        return self.procgen.observe()[1]["rgb"], {}

    def step(self, actions):
        """integers [N] -> observations, rewards [N], terminated [N], truncated [N] (all false), {}."""
        self.procgen.act(actions)
        rewards, obs, first = self.procgen.observe()
        return obs["rgb"], rewards, first, np.zeros_like(first), {}

    def state_dict(self):
        """-> {environment: its exact state, uint8 [bytes]}. Without this method a resumed run begins new episodes."""
        states = enumerate(self.procgen.callmethod("get_state"))
        return {i: torch.frombuffer(bytearray(state), dtype=torch.uint8) for i, state in states}

    def load_state_dict(self, states):
        self.procgen.callmethod("set_state", [state.numpy().tobytes() for state in states.values()])


def make_envs(args, num_envs, seed, held_out=False, **options):
    """Replace this to train elsewhere: return any gym vector env with uint8 images [H, W, C] and discrete actions."""
    start, number = args.start_level, args.num_levels
    if held_out and number:  # all levels after the training ones; 0 would be all, the training ones too
        start, number = start + number, 2**31 - 1 - (start + number)
    if args.distribution_mode != "exploration":  # which has a level of its own
        options |= {"start_level": start, "num_levels": number}
    return ProcgenVectorEnv(args.env_id, num_envs, seed, distribution_mode=args.distribution_mode, **options)


class RewardNormalizer:
    """Divides rewards by the running standard deviation of the discounted return, then clips them to +-10.

    One learning rate then serves games whose scores differ by a factor of ten. The mean is not subtracted: that would
    amount to a reward or a fine for each step survived. The moments take in the whole rollout before it is divided
    (official reward_normalizer.py, RewardNormalizer).
    """

    def __init__(self, num_envs, gamma):
        self.gamma = gamma
        self.discounted = torch.zeros(num_envs, dtype=torch.float64)  # discounted sum of the episode's rewards
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, rewards, dones):
        """rewards, dones (dones[:, t]: step t ended an episode): [N, T] -> normalised rewards [N, T] fp32."""
        sums = torch.empty(rewards.shape, dtype=torch.float64)
        for t in range(rewards.shape[1]):
            self.discounted = self.gamma * self.discounted + rewards[:, t]
            sums[:, t] = self.discounted
            self.discounted = self.discounted * (1 - dones[:, t])
        sums = torch.cat(gather(sums))
        n, mean, var = sums.numel(), sums.mean().item(), sums.var(correction=0).item()
        total, delta = self.count + n, mean - self.mean
        self.var = (self.var * self.count + var * n + delta**2 * self.count * n / total) / total
        self.mean += delta * n / total
        self.count = total
        return (rewards / math.sqrt(self.var + 1e-8)).clamp(-10, 10)


# ----------------------------------------------------------------------------------------------------------------- math
def compute_gae(rewards, values, dones, gamma, gae_lambda):
    """Generalised advantage estimation (arXiv:1506.02438): A_t = sum over l of (gamma lambda)^l delta_{t+l}.

    delta_t = r_t + gamma V_{t+1} - V_t is how much better step t went than V had said. lambda 0 trusts V, and inherits
    its errors; lambda 1 trusts the rewards that followed, and inherits their noise. The sum ends with the episode or
    the rollout; computed from the back, it takes one product a step.

    rewards, dones [N, T], values [N, T+1]; dones[:, t] says that step t ended an episode, so that values[:, t+1] is of
    the next one and does not count. -> advantages [N, T], value targets V^targ = A + V [N, T].
    """
    advantages, advantage = torch.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[1])):
        not_done = 1.0 - dones[:, t]
        delta = rewards[:, t] + gamma * not_done * values[:, t + 1] - values[:, t]
        advantage = delta + gamma * gae_lambda * not_done * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values[:, :-1]


@torch.no_grad()
def act(agent, obs, bf16=False):
    """uint8 [N, H, W, C] -> sampled actions [N], their log-probabilities [N], values [N]."""
    logits, _, values = agent(obs, bf16)
    logprobs = F.log_softmax(logits, dim=-1)
    # argmax of p / Exp(1) noise is a sample of p. The noise is the host's: one generator to save, whatever the device.
    noise = torch.empty(logprobs.shape).exponential_().to(logprobs.device)
    actions = (logprobs.exp() / noise).argmax(-1)
    return actions, logprobs.gather(-1, actions[:, None]).squeeze(-1), values


def kl_divergence(old_logits, new_logits):
    """KL[pi_old, pi] over all actions in nats, mean over the batch; logits [B, A] -> scalar, exactly 0 if equal.
    In this direction pi is penalised for losing actions that pi_old took: the loss of behavioural cloning."""
    old, new = F.log_softmax(old_logits, dim=-1), F.log_softmax(new_logits, dim=-1)
    return (old.exp() * (old - new)).sum(-1).mean()


def policy_phase_loss(agent, batch, args, bf16=False, train_policy=True, train_value=True):
    """-L^clip - beta_S * entropy + L^value on a flat batch {obs, actions, logprobs, advantages, targets}
    -> loss, what to log of it {tag: scalar}.

    The sum mixes nothing: two networks share no parameter, and with one the value gradient stops at the value head
    (unless --detach-value never, PPO's sharing). A parameter that no loss reaches keeps grad None, and Adam skips it;
    at a gradient of zero its momentum would still move it.
    """
    logits, _, values = agent(batch["obs"], bf16, detach_value=args.detach_value != "never")
    loss, metrics = 0.0, {}
    if train_policy:
        logprobs = F.log_softmax(logits, dim=-1)
        log_ratio = logprobs.gather(-1, batch["actions"][:, None]).squeeze(-1) - batch["logprobs"]
        ratio = log_ratio.exp()
        # L^clip (PPO, arXiv:1707.06347): clipping removes the incentive to move a ratio beyond the range, but not the
        # gradient that brings it back. The penalty is the KL's second-order estimate (official ppo.py, compute_losses).
        surrogate = -batch["advantages"] * ratio
        if args.clip_coef > 0:
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            surrogate = torch.maximum(surrogate, -batch["advantages"] * clipped)
            metrics["losses/clipfrac"] = ((ratio - 1).abs() > args.clip_coef).float().mean()
        policy_loss = surrogate.mean() + args.kl_coef * 0.5 * log_ratio.square().mean()
        entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
        loss = policy_loss - args.ent_coef * entropy
        approx_kl = (ratio - 1 - log_ratio).mean()  # never negative, and of less variance than -log_ratio
        metrics |= {"losses/policy_loss": policy_loss, "losses/entropy": entropy, "losses/approx_kl": approx_kl}
    if train_value:
        value_loss = 0.5 * (values - batch["targets"]).square().mean()
        loss = loss + value_loss
        metrics["losses/value_loss"] = value_loss
    return loss, metrics


def auxiliary_phase_loss(agent, batch, args, bf16=False):
    """L^joint + L^value on a flat batch {obs, old_logits, targets} -> loss, what to log of it {tag: scalar}.

    The auxiliary value loss is what brings the value function's features into the policy network (the auxiliary values
    serve no other end); behavioural cloning, the KL term, holds its behaviour in place. With one network both value
    losses reach the encoder, unless --detach-value always.
    """
    logits, aux_values, values = agent(batch["obs"], bf16, detach_value=args.detach_value == "always")
    aux_value_loss = 0.5 * (aux_values - batch["targets"]).square().mean()
    kl_loss = kl_divergence(batch["old_logits"], logits)
    joint_loss = aux_value_loss + args.beta_clone * kl_loss
    value_loss = 0.5 * (values - batch["targets"]).square().mean()
    metrics = {"kl_loss": kl_loss, "aux_value_loss": aux_value_loss, "real_value_loss": value_loss}
    return joint_loss + value_loss, {f"losses/aux/{name}": value for name, value in metrics.items()}


def minibatches(data, size, epochs, device):
    """Yield (epoch, `size` rows of everything) from {name: [rows, ...]} of one device, each epoch in a new order."""
    for epoch in range(epochs):
        # The order is moved as a whole: a GPU would wait for each minibatch's part of it.
        for rows in torch.randperm(len(data["obs"])).to(data["obs"].device).split(size):
            yield epoch, {name: x[rows].to(device) for name, x in data.items()}


def chunks(batch, size):
    """Yield (at most `size` observations of the batch, their share of it). The gradients of share * loss add up to the
    batch's, if the loss is a mean over observations; the activations take a chunk's memory, not the batch's."""
    for parts in zip(*(x.split(size) for x in batch.values())):
        yield dict(zip(batch, parts)), len(parts[0]) / len(batch["obs"])


# ------------------------------------------------------------------------------------------------------------- training
def train(args, run_dir):
    """Algorithm 1 of the paper -> the trained Agent. Writes TensorBoard files, agent.pt and checkpoints to run_dir."""
    device, policy_bf16, aux_bf16 = choose_device(args)
    N, T = args.num_envs // WORLD_SIZE, args.num_steps  # of this process
    num_rollouts = math.ceil(args.total_timesteps / (args.num_envs * T))  # deviation 4: rounded up
    has_aux_phase = args.e_aux > 0 and num_rollouts >= args.n_pi
    S = N * (args.n_pi if has_aux_phase else 1)
    storage = choose_storage(args, device, S)  # before anything large is made
    np.random.seed(stream_seed(args.seed, RANK))  # for environments that draw from it
    torch.manual_seed(args.seed)
    envs = make_envs(args, N, stream_seed(args.seed, RANK))
    image, num_actions = envs.single_observation_space.shape, int(envs.single_action_space.n)
    agent = Agent(image, num_actions, args.arch).to(device)  # the same on all ranks; what follows differs by rank
    if RANK:
        torch.manual_seed(stream_seed(args.seed, RANK))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    aux_optimizer = torch.optim.Adam(agent.parameters(), lr=args.aux_learning_rate, fused=True)
    if args.compile:  # not the heads: a compiled one that no loss reaches gets a gradient of zero instead of None
        torch._dynamo.config.suppress_errors = True  # without a compiler, say so and go on
        for encoder in filter(None, (agent.policy_encoder, agent.value_encoder)):
            encoder.compile()
    episodes, normalize = EpisodeStatistics(N), RewardNormalizer(N, args.reward_norm_gamma)

    # The phase buffer (Algorithm 1's B) of S segments, filled in place by the rollouts. uint8 images, a quarter of what
    # floats would take, are turned into floats a chunk at a time. Without auxiliary phases it keeps one rollout.
    aux_obs = torch.empty(S, T, *image, dtype=torch.uint8, device=storage)
    aux_targets, old_logits = torch.zeros(S, T, device=storage), torch.zeros(S, T, num_actions, device=storage)
    actions, logprobs = torch.zeros(N, T, dtype=torch.int64), torch.zeros(N, T)
    rewards, dones, values = torch.zeros(N, T), torch.zeros(N, T), torch.zeros(N, T + 1)
    # Observations that pass through the networks at a time: few on a CPU, within 3 % of the fastest; on a GPU as many
    # as take 3.0 GB with their gradients (measured on an H200).
    chunk_size = aux_chunk_size = 256 if args.arch == "shared" else 128
    if device.type == "cuda":
        chunk_size, aux_chunk_size = 4 * chunk_size, (16 if aux_bf16 else 4) * chunk_size

    numerics = announce(args, agent, aux_obs, device, policy_bf16, aux_bf16)
    state = {"agent": agent, "optimizer": optimizer, "aux_optimizer": aux_optimizer, "envs": envs}
    state |= {"episodes": vars(episodes), "normalize": vars(normalize)}  # live: `restore` updates the objects
    next_obs, _ = envs.reset()
    phases_done = global_step = 0
    if args.resume:
        phases_done, global_step, next_obs = restore(run_dir, state, numerics, next_obs)
    elif args.checkpoint_every:
        save_checkpoint(run_dir, args, state, numerics, 0, 0, next_obs)
    check_equal(agent)
    log = Log(args, run_dir, global_step, num_rollouts * args.num_envs * T)

    for phase in range(phases_done + 1, math.ceil(num_rollouts / args.n_pi) + 1):
        # ---- Policy phase (Alg. 1): N_pi iterations of rollout and update; the last phase may be shorter ----
        log.start_phase()
        iterations = min(args.n_pi, num_rollouts - (phase - 1) * args.n_pi)
        for i in range(iterations):
            # Roll out the current policy; dones[:, t] tells that step t, taken in obs[:, t], ended an episode.
            segments = slice(i * N, (i + 1) * N) if has_aux_phase else slice(N)
            obs = aux_obs[segments]
            for t in range(T):
                obs[:, t] = torch.from_numpy(next_obs)
                actions[:, t], logprobs[:, t], values[:, t] = act(agent, obs[:, t].to(device), policy_bf16)  # GPU sync
                next_obs, reward, terminated, truncated, _ = envs.step(actions[:, t].numpy())
                rewards[:, t], dones[:, t] = torch.from_numpy(reward), torch.from_numpy(terminated | truncated)
            values[:, T] = act(agent, torch.from_numpy(next_obs).to(device), policy_bf16)[2]  # for GAE; not a step
            global_step += args.num_envs * T
            log.lap("rollout")

            # V^targ, A <- GAE, on the host: T small operations in a row. A is normalised over the full batch of all
            # processes, not over each minibatch, where a step's would depend on the steps it was drawn with.
            scaled_rewards = normalize(rewards, dones)
            advantages, targets = compute_gae(scaled_rewards, values, dones, args.gamma, args.gae_lambda)
            residuals, all_targets = torch.cat(gather(targets - values[:, :-1])), torch.cat(gather(targets))
            explained_variance = 1 - residuals.var() / all_targets.var()
            log.add({"losses/explained_variance": explained_variance.nan_to_num()}, 1.0)
            all_advantages = torch.cat(gather(advantages))
            advantages = (advantages - all_advantages.mean()) / (all_advantages.std(correction=0) + 1e-8)
            aux_targets[segments] = targets  # B += (s, V^targ); s is in place already

            # E_pi epochs of -L^clip - beta_S * entropy w.r.t. theta_pi, E_V epochs of L^value w.r.t. theta_V, side by
            # side: each loss takes part while its own epochs last. Minibatches of single transitions: deviation 3.
            data = {"obs": obs, "actions": actions, "logprobs": logprobs, "advantages": advantages, "targets": targets}
            data = {name: x.flatten(0, 1).to(storage) for name, x in data.items()}
            for epoch, batch in minibatches(data, N * T // args.num_minibatches, max(args.e_pi, args.e_v), device):
                optimizer.zero_grad()
                for chunk, share in chunks(batch, chunk_size):
                    train_policy, train_value = epoch < args.e_pi, epoch < args.e_v
                    loss, metrics = policy_phase_loss(agent, chunk, args, policy_bf16, train_policy, train_value)
                    (share * loss).backward()
                    log.add(metrics, share)
                average_gradients(agent)
                optimizer.step()

            log.lap("policy_phase")
            scalars = {**episodes(rewards, dones, envs), "charts/learning_rate": args.learning_rate}
            log.write_iteration(phase, global_step, scalars)

        if has_aux_phase and iterations == args.n_pi:
            # ---- Auxiliary phase (Alg. 1), with an Adam of its own, as in the official code ----
            # pi_old(.|s) for the whole buffer, in the epochs' precision and batch sizes, so that the first KL is 0.
            size = N // args.num_aux_minibatches  # segments in a minibatch
            for start in range(0, S, size):
                batch = {"obs": aux_obs[start : start + size].flatten(0, 1).to(device)}
                with torch.no_grad():
                    logits = [agent(chunk["obs"], aux_bf16)[0] for chunk, _ in chunks(batch, aux_chunk_size)]
                old_logits[start : start + size] = torch.cat(logits).unflatten(0, (size, T))

            # E_aux epochs of L^joint w.r.t. theta_pi and L^value w.r.t. theta_V; V^targ stays what the rollouts gave.
            data = {"obs": aux_obs, "old_logits": old_logits, "targets": aux_targets}
            for k, (_, drawn) in enumerate(minibatches(data, size, args.e_aux, device)):
                batch = {name: x.flatten(0, 1) for name, x in drawn.items()}
                aux_optimizer.zero_grad()
                for chunk, share in chunks(batch, aux_chunk_size):
                    loss, metrics = auxiliary_phase_loss(agent, chunk, args, aux_bf16)
                    (share * loss).backward()
                    log.add(metrics, share)
                average_gradients(agent)
                aux_optimizer.step()
                log.print_auxiliary(phase, (k + 1) / (S // size), args.e_aux)
            log.lap("auxiliary_phase")
            log.write(f"auxiliary phase {phase}", global_step, {})

        # ---- Phase boundary: the buffer is used up, so that a checkpoint is small and exact ----
        check_equal(agent)
        check_finite(agent.state_dict(), f"phase {phase}, step {global_step}")
        if args.eval_episodes:
            scalars = evaluate(args, agent, device, args.eval_episodes, global_step, run_dir)
            log.write("evaluation", global_step, scalars)
        weights = {"args": vars(args), "image": image, "global_step": global_step, "agent": agent.state_dict()}
        save(run_dir / "agent.pt", weights)
        # every `checkpoint_every` phases, and after the last that is complete
        due = args.checkpoint_every and (phase % args.checkpoint_every == 0 or phase == num_rollouts // args.n_pi)
        if due and iterations == args.n_pi:
            save_checkpoint(run_dir, args, state, numerics, phase, global_step, next_obs)
    log.print_summary(run_dir)
    envs.close()
    return agent


# --------------------------------------------------------------------------------- plumbing: logging and the console
class Stopped(Exception):
    """Ends a run from within; the script makes one line and exit status 1 of it. The last checkpoint stays."""


def check_finite(values, where):
    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            advice = "begin anew with a smaller --learning-rate, as --resume would repeat it"
            raise Stopped(f"{name} is not finite in {where}; {advice}")


class EpisodeStatistics:
    """Undiscounted returns and lengths of all episodes that end, from the raw rewards."""

    def __init__(self, num_envs):
        self.under_way = torch.zeros(num_envs, 2, dtype=torch.float64)  # return and length so far
        self.recent = []  # returns of the last 100 episodes

    def __call__(self, rewards, dones, envs):
        """A rollout's [N, T] -> what to log of it {tag: scalar}; its own means only where an episode ended."""
        ended = []  # [return, length], in order of time
        for reward, done in zip(rewards.T, dones.T > 0):
            self.under_way += torch.stack([reward, torch.ones_like(reward)], dim=1)
            ended += self.under_way[done].tolist()
            self.under_way[done] = 0
        ended = [episode for part in gather(ended) for episode in part]
        self.recent = [*self.recent, *(total for total, _ in ended)][-100:]
        scalars = {"charts/episodes": len(ended)}
        if self.recent:
            scalars["charts/episodic_return_100"] = np.mean(self.recent)
        if ended:
            mean_return, mean_length = np.mean(ended, axis=0)
            scalars |= {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
            scalars |= normalized("charts", mean_return, envs)
        return scalars


def normalized(group, mean_return, envs):
    """-> {tag: 0 at R_min, 1 at R_max}, or {} where the environments have no return_range."""
    low, high = getattr(envs, "return_range", None) or (math.nan, math.nan)
    return {} if math.isnan(low) else {f"{group}/normalized_return": (mean_return - low) / (high - low)}


class Log:
    """TensorBoard, the console, and the times and rates that they show."""

    def __init__(self, args, run_dir, step, total):
        if RANK == 0:
            self.writer = SummaryWriter(run_dir, purge_step=step + 1)  # without what came after the last checkpoint
            flags = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
            self.writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{flags}", step)
        self.first, self.total, self.phase = step, total, args.n_pi * args.num_envs * args.num_steps  # steps
        self.start, self.sums = time.perf_counter(), {}
        self.times = []  # {part of the algorithm: seconds} of each phase

    def start_phase(self):
        self.times.append(Counter())
        self.lap_start = self.last_line = time.perf_counter()

    def add(self, metrics, weight):
        """Take {tag: scalar} into the means, which stay on the device until they are written."""
        for tag, value in metrics.items():
            total, weights = self.sums.get(tag, (0.0, 0.0))
            self.sums[tag] = total + weight * value.detach(), weights + weight

    def means(self, pooled=True):
        """-> {tag: mean}; `pooled`: over all processes, which then must ask together."""
        means = {tag: float(total / weights) for tag, (total, weights) in self.sums.items()}  # GPU sync
        parts = gather(means) if pooled else [means]
        return {tag: sum(part[tag] for part in parts) / len(parts) for tag in means}

    def lap(self, part):
        """Book the time since the last lap to this part of the algorithm."""
        seconds = time.perf_counter() - self.lap_start
        self.times[-1][part] += seconds
        self.add({f"time/{part}": torch.tensor(seconds)}, 1.0)
        self.lap_start += seconds

    def write(self, where, step, scalars):
        """Means since the last time, and these scalars. Stops the run at a mean that is NaN or infinite."""
        means, self.sums = self.means(), {}
        check_finite(means, f"{where}, step {step}")
        if RANK == 0:
            for tag, value in (means | scalars).items():
                self.writer.add_scalar(tag, value, step)
            self.writer.flush()
        LIBC.malloc_trim(0)  # give back, for now, what `choose_device` lets malloc keep
        return means

    def write_iteration(self, phase, step, scalars):
        """Write, and print a line. The rate is that of the last phase, auxiliary phase included, once there is one."""
        first = len(self.times) == 1
        rate = (step - self.first if first else self.phase) / self.times[-1 if first else -2].total()
        left = "?" if first else timedelta(seconds=round((self.total - step) / rate))
        means = self.write(f"policy phase {phase}", step, {**scalars, "charts/SPS": rate})
        recent, kl = scalars.get("charts/episodic_return_100", math.nan), means["losses/approx_kl"]
        line = f"step {step:,}/{self.total:,} {step / self.total:.1%} | return {recent:.2f}"
        line += f" (n={scalars['charts/episodes']}) | kl {kl:.4f} | ev {means['losses/explained_variance']:.2f}"
        print(f"{line} | {rate:,.0f} steps/s | left {left}", flush=True)

    def print_auxiliary(self, phase, epochs, e_aux):
        """A line at the end of each epoch, and once a minute. The means are those of the epoch."""
        if epochs.is_integer() or time.perf_counter() > self.last_line + 60:
            self.last_line = time.perf_counter()
            means = self.means(pooled=epochs.is_integer())
            losses = " | ".join(f"{tag.split('/')[-1]} {mean:.4f}" for tag, mean in means.items())
            print(f"  auxiliary phase {phase}, epoch {epochs:.2f}/{e_aux} | {losses}", flush=True)
            LIBC.malloc_trim(0)
        if epochs.is_integer() and epochs < e_aux:
            self.sums = {}

    def print_summary(self, run_dir):
        if not self.times:
            print(f"{run_dir} is complete at step {self.first:,}: a larger --total-timesteps extends it")
            return
        whole = (self.total - self.first) // self.phase  # phases that the end of the run does not cut short
        counted = self.times[1:whole] or self.times[:1]  # the first only where there is no other
        steps, seconds = min(len(counted) * self.phase, self.total - self.first), sum(counted, Counter())
        rate = f"{steps / seconds.total():,.0f} steps/s {'after the first phase' if whole > 1 else 'in one phase'}"
        shares = ", ".join(f"{part.replace('_', ' ')} {t / seconds.total():.0%}" for part, t in seconds.items())
        wall = timedelta(seconds=round(time.perf_counter() - self.start))
        print(f"done in {wall} | {rate} | {shares} | {run_dir}/agent.pt", flush=True)


# ----------------------------------------------------------------- plumbing: run directory, checkpoint, resume, signals
@contextlib.contextmanager
def run_directory(args):
    """Make the run directory, or enter that of --resume -> its Path, locked until the `with` block ends. By rank 0."""
    name = f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir, lock = Path(args.resume or args.run_dir or name), contextlib.nullcontext()
    try:
        if RANK == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = (run_dir / ".lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
    except BlockingIOError:
        fail(f"another process is running in {run_dir}: choose another --run-dir")
    except OSError as error:
        fail(f"cannot write into the run directory {run_dir}: {error.strerror}")
    with lock:
        if RANK == 0 and not args.resume and any(run_dir.glob("*.pt")):
            resumable = any(run_dir.glob("checkpoint*.pt"))
            resume = f"continue it with --resume {shlex.quote(str(run_dir))}, or " if resumable else ""
            fail(f"{run_dir} already holds a run: {resume}choose another --run-dir")
        yield gather(run_dir)[0]


def save(path, data, previous=None):
    """Write data and checksum to a new file, then rename: `path` (old: `previous`) is complete at every instant."""
    if RANK:
        return
    torch.save(data, buffer := io.BytesIO())  # by way of a buffer: torch turns a full disk into an internal error
    content, unfinished = buffer.getvalue(), path.with_suffix(".partial")  # a leftover is overwritten
    with unfinished.open("wb") as file:
        file.write(content + hashlib.sha256(content).digest())  # torch ignores it, and many a flipped bit too
        file.flush()
        os.fsync(file.fileno())
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(unfinished, path)


def load(path, device="cpu"):
    """-> what `save` has written there; ValueError where it is missing or damaged."""
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ValueError("missing or damaged")
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


def load_agent(path, device="cpu"):
    """agent.pt of a run -> the Agent, the run's flags as a Namespace."""
    saved = load(Path(path), device)
    args, weights = argparse.Namespace(**saved["args"]), saved["agent"]
    agent = Agent(saved["image"], len(weights["policy_head.bias"]), args.arch).to(device)
    agent.load_state_dict(weights)
    return agent, args


def save_checkpoint(run_dir, args, state, numerics, phase, global_step, next_obs):
    """Everything needed to continue from a phase boundary, as tensors and plain values, which weights_only can load."""
    data = {"args": {**vars(args), "resume": None}, "numerics": numerics, "phase": phase, "global_step": global_step}
    data |= {name: state[name].state_dict() for name in ("agent", "optimizer", "aux_optimizer")}
    mine = {"next_obs": torch.from_numpy(next_obs), "cpu_random": torch.get_rng_state()}
    mine["envs"] = state["envs"].state_dict() if hasattr(state["envs"], "state_dict") else None
    data["ranks"] = gather({**mine, "episodes": state["episodes"], "normalize": state["normalize"]})
    save(run_dir / "checkpoint.pt", data, previous=run_dir / "checkpoint.previous.pt")


def load_checkpoint(run_dir):
    """-> path and content of the newest checkpoint that is undamaged; ValueError where there is none."""
    for path in (Path(run_dir, "checkpoint.pt"), Path(run_dir, "checkpoint.previous.pt")):
        with contextlib.suppress(ValueError):
            return path, load(path)
    raise ValueError("not the directory of a run with a complete, undamaged checkpoint")


def restore(run_dir, state, numerics, next_obs):
    """Put a checkpoint's content back into place -> phase, global_step, the observations to go on from."""
    path, data = load_checkpoint(run_dir)
    mine = data["ranks"][RANK]
    gather(None)  # all have read it
    if path.name != "checkpoint.pt" and RANK == 0:
        print(f"warning: checkpoint.pt is missing or damaged, going on from {path.name}", file=sys.stderr)
        os.replace(path, run_dir / "checkpoint.pt")
    if data["numerics"] != numerics and RANK == 0:
        print(f"warning: not bit-identical: saved on {data['numerics']}, resumed on {numerics}", file=sys.stderr)
    for name in ("agent", "optimizer", "aux_optimizer"):
        state[name].load_state_dict(data[name])
    for name in ("episodes", "normalize"):
        state[name].update(mine[name])
    torch.set_rng_state(mine["cpu_random"])
    if mine["envs"] is not None:
        state["envs"].load_state_dict(mine["envs"])
        return data["phase"], data["global_step"], mine["next_obs"].numpy()
    if RANK == 0:
        print("warning: these environments have no state_dict; their episodes begin anew", file=sys.stderr)
    for sums in (state["episodes"]["under_way"], state["normalize"]["discounted"]):
        sums.zero_()
    return data["phase"], data["global_step"], next_obs


def stop(args, run_dir, reason, status):
    """End at once and say what is saved. No clean-up: the last checkpoint is complete at every instant."""
    if RANK:
        time.sleep(30 if status == 1 else 0)  # rank 0 says why; when it has ended, torchrun ends this process
        os._exit(status)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # one reason is enough
    saved = "nothing to resume is saved"
    with contextlib.suppress(OSError, RuntimeError, ValueError, TypeError, pickle.UnpicklingError):
        data = load_checkpoint(run_dir)[1]  # TypeError: no directory yet
        rollout = args.num_envs * args.num_steps
        phases = min(args.checkpoint_every, math.ceil(args.total_timesteps / rollout) // args.n_pi)
        first = f"the first checkpoint comes at step {phases * args.n_pi * rollout:,}"
        nothing = f"nothing but the start is saved, {first if phases else 'no checkpoint comes'}"
        saved = f"saved up to step {data['global_step']:,}" if data["global_step"] else nothing
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={LOCAL_WORLD_SIZE}"] if WORLD_SIZE > 1 else []
        flags = sys.argv[1:] if args.resume else ["--resume", str(run_dir)]
        saved += f"; continue with: {shlex.join([sys.executable, *torchrun, sys.argv[0], *flags])}"
        saved += " and torchrun's flags for several machines" if WORLD_SIZE > LOCAL_WORLD_SIZE else ""
    os.write(2, f"\n{Path(__file__).name}: {reason}: {saved}\n".encode())
    os._exit(status)


# --------------------------------------------------------------------------------------- plumbing: evaluation and video
def play(envs, agent, device, bf16, quota):
    """-> returns, as many of each environment; the first to end overall would be those of short episodes."""
    returns, totals = [[] for _ in range(envs.num_envs)], np.zeros(envs.num_envs)
    obs, _ = envs.reset()
    while min(map(len, returns)) < quota:
        actions = act(agent, torch.from_numpy(obs).to(device), bf16)[0]
        obs, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        totals += rewards
        for i in np.flatnonzero(terminated | truncated):
            returns[i].append(totals[i])
            totals[i] = 0
    return np.concatenate([part[:quota] for part in returns])


@torch.random.fork_rng(devices=())
def evaluate(args, agent, device, num_episodes, step, run_dir):
    """Play K episodes on held-out levels, and on the training levels where they are finite, shared by the processes;
    print a line for each kind -> scalars to log. Environments are made anew and random numbers are its own: training
    is the same, bit for bit, without it, and every evaluation of a run sees the same levels."""
    num_envs, seed = max(1, min(num_episodes, 64) // WORLD_SIZE), stream_seed(args.seed, 1000 + RANK)
    quota, bf16 = math.ceil(num_episodes / (num_envs * WORLD_SIZE)), args.precision == "bf16"
    torch.manual_seed(seed)
    means = {}
    for name in ("training", "held-out") if args.num_levels else ("fresh",):  # fresh: of all, from another seed
        envs = make_envs(args, num_envs, seed, held_out=name != "training")
        returns = np.concatenate(gather(play(envs, agent, device, bf16, quota)))
        envs.close()
        means[name], error = returns.mean(), returns.std() / math.sqrt(len(returns))
        scalars = {"eval/episodic_return": means[name], **normalized("eval", means[name], envs)}
        score = scalars.get("eval/normalized_return")
        score = "no range to normalise by" if score is None else f"normalised {score:.3f}"
        line = f"return {means[name]:.2f} +- {error:.2f}, {score}, {len(returns)} episodes"
        print(f"  evaluation on {name} levels: {line}", flush=True)
    if "training" in means:
        scalars["eval/generalization_gap"] = means["training"] - means["held-out"]
    if args.capture_video and RANK == 0:
        screen = make_envs(args, 1, seed, held_out=True, render_mode="rgb_array")
        folder = run_dir / "videos"
        screen.procgen = VideoRecorderWrapper(screen.procgen, folder, info_key="rgb", prefix=f"step-{step}-")
        play(screen, agent, device, bf16, 1)
        os.replace(screen.procgen.videopath, folder / f"step-{step}.mp4")
        screen.close()
    return scalars  # of the last kind, held-out or fresh levels


# ------------------------------------------------------------------------- plumbing: several processes, device, memory
def together(operation, *arguments):
    """An operation of all processes; where another one has died, this one ends too."""
    try:
        operation(*arguments)
    except RuntimeError as error:
        raise Stopped("another process has ended") from error


def gather(value):
    """-> [the value of every process]."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        together(dist.all_gather_object, values, value)
    return values


def average_gradients(agent):
    """Average all gradients over all processes in one call. Not by DistributedDataParallel: it would do so at every
    backward, of each chunk here, and wants one for every parameter, also for those that no loss reaches."""
    if WORLD_SIZE > 1:
        gradients = [p.grad for p in agent.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / WORLD_SIZE
        together(dist.all_reduce, flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def check_equal(agent):
    """Stop the run where the processes' parameters differ by a bit."""
    parameters = b"".join(p.detach().cpu().numpy().tobytes() for p in agent.parameters())
    if len(set(gather(hashlib.sha256(parameters).digest()))) > 1:
        raise Stopped("the processes' parameters differ")


def stream_seed(seed, rank):
    """-> the seed of a rank's random streams, which is the seed itself on rank 0. The multiples of this number (2^32 by
    the golden ratio) lie apart: no two pairs of 100,000 seeds and 1,000 ranks share one, as seed + rank would."""
    return (seed + rank * 0x9E3779B1) % 2**31


def choose_device(args):
    """-> device, bf16 in the policy phase, bf16 in the auxiliary phase."""
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no CUDA device here; leave the flag out or use --device cpu")
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    if WORLD_SIZE > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own choice if the user made none
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // LOCAL_WORLD_SIZE))
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"  # convolutions, 98 % of all products; heads stay fp32
    if device.type == "cuda":
        if LOCAL_WORLD_SIZE > torch.cuda.device_count():
            fail(f"{LOCAL_WORLD_SIZE} processes on {torch.cuda.device_count()} GPUs: one each, or --device cpu")
        torch.cuda.set_device(LOCAL_RANK)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
        # glibc gives large freed blocks back to the kernel, and every chunk faults them in again: 66,000 pages in fp32.
        # Keeping them makes training passes 1.3 times as fast (2 cores, AMX).
        LIBC.mallopt(-4, 0)  # malloc.h: M_MMAP_MAX
        LIBC.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return device, args.precision == "bf16", args.precision == "bf16" or (args.precision == "auto" and has_bf16)


def free_memory(root="/"):
    """Bytes still to be had: MemAvailable, or what the container's cgroup (v2) leaves where that is less."""
    group = Path(root, "sys/fs/cgroup")
    free = 1024 * int(re.search(r"MemAvailable: +(\d+)", Path(root, "proc/meminfo").read_text())[1])
    with contextlib.suppress(OSError, ValueError):  # there is no such group; "max" is no limit
        room = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        cached = re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())  # gives way
        free = min(free, room + int(cached[1]))
    return free


def choose_storage(args, device, segments):
    """-> the device on which the phase buffer fits; an error where it fits on none."""
    needed, working = segments * args.num_steps * 64 * 64 * 3, 1_500_000_000  # Procgen's observations; all else
    free = min(gather(free_memory())) // LOCAL_WORLD_SIZE
    if device.type == "cuda" and needed + 4e9 < torch.cuda.mem_get_info()[0]:  # 3.0 GB of activations, 1 to spare
        return device
    if needed + working > free:
        fits = int((free - working) / needed * (segments * WORLD_SIZE // args.num_envs))
        advice = f"--n-pi {fits} is the largest that fits" if fits > 0 else "take fewer --num-envs or --num-steps"
        fail(f"the phase buffer takes {needed:,} bytes, training {working:,} more, and {free:,} are free: {advice}")
    return torch.device("cpu")


def announce(args, agent, aux_obs, device, policy_bf16, aux_bf16):
    """Print the run's first line -> what the last bits of its results depend on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    names = "TF32" if device.type == "cuda" and args.precision != "fp32" else "fp32", "bf16"
    numerics = f"{device.type} ({hardware}), policy phase {names[policy_bf16]}, auxiliary phase {names[aux_bf16]}"
    size = f"{args.arch}, {sum(p.numel() for p in agent.parameters()):,} parameters"
    game = f"{args.env_id} {args.distribution_mode}, {args.num_levels or 'all'} levels | {size}"
    phase = f"{args.num_envs} environments x {args.num_steps} steps, N_pi {args.n_pi} | {numerics}"
    print(f"{game} | {phase} | buffer {aux_obs.nbytes / 1e9:.2f} GB on {aux_obs.device}", flush=True)
    return f"{numerics}, torch {torch.__version__}"


# ---------------------------------------------------------------------------------------------------- plumbing: flags
def fail(message, word="", known=()):
    """End with exit status 2 and one line on stderr: what is wrong, and what would be right or like the wrong word."""
    if LOCAL_RANK:
        time.sleep(30)  # the first process of the machine says it; when it has ended, torchrun ends this one
    for similar in difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.7):  # --lr is 0.6 from --arch
        message += f"; did you mean {similar}?"
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# game: {distribution mode: (R_min, R_max) of the Procgen paper (arXiv:1912.01588, appendix C), None where it has none}
GAMES = {
    "bigfish": {"easy": (1, 40), "hard": (0, 40)},
    "bossfight": {"easy": (0.5, 13), "hard": (0.5, 13)},
    "caveflyer": {"easy": (3.5, 12), "hard": (2, 13.4), "memory": None, "exploration": None},
    "chaser": {"easy": (0.5, 13), "hard": (0.5, 14.2), "extreme": None},
    "climber": {"easy": (2, 12.6), "hard": (1, 12.6), "exploration": None},
    "coinrun": {"easy": (5, 10), "hard": (5, 10), "exploration": None},
    "dodgeball": {"easy": (1.5, 19), "hard": (1.5, 19), "extreme": None, "memory": None},
    "fruitbot": {"easy": (-1.5, 32.4), "hard": (-0.5, 27.2)},
    "heist": {"easy": (3.5, 10), "hard": (2, 10), "memory": None, "exploration": None},
    "jumper": {"easy": (3, 10), "hard": (1, 10), "memory": None, "exploration": None},
    "leaper": {"easy": (3, 10), "hard": (1.5, 10), "extreme": None, "exploration": None},
    "maze": {"easy": (5, 10), "hard": (4, 10), "memory": None, "exploration": None},
    "miner": {"easy": (1.5, 13), "hard": (1.5, 20), "memory": None},
    "ninja": {"easy": (3.5, 10), "hard": (2, 10), "exploration": None},
    "plunder": {"easy": (4.5, 30), "hard": (3, 30)},
    "starpilot": {"easy": (2.5, 64), "hard": (1.5, 35), "extreme": None},
}


def number(kind, low, high, text):
    """An argparse type, but for its first parameters; a whole number may be written 64, 25_000_000 or 25e6."""
    with contextlib.suppress(ValueError):
        if low <= float(text) <= high and kind(float(text)) == float(text):
            return kind(float(text))
    name = "whole number" if kind is int else "number"
    raise argparse.ArgumentTypeError(f"{text} is not a {name} from {low:,} to {high:,}")


COUNT, UINT = partial(number, int, 1, 10**12), partial(number, int, 0, 10**9)
POSITIVE, WEIGHT = partial(number, float, 1e-12, 1e12), partial(number, float, 0, 1e12)
DISCOUNT, FRACTION = partial(number, float, 1e-12, 1), partial(number, float, 0, 1)
RESUME_MAY_CHANGE = {"resume", "total_timesteps", "checkpoint_every", "device", "eval_episodes", "capture_video"}
EVALUATE_MAY_CHANGE = {"evaluate", "agent", "capture_video", "device", "seed"}


def check_flags(parser, argv):
    """Flags -> Namespace, those of the run that is resumed or evaluated included; `fail` at what only several tell."""
    args, unknown = parser.parse_known_args(argv)
    names = {name: f"--{name.replace('_', '-')}" for name in vars(args)}
    if unknown:
        fail(f"{unknown[0]}: no such flag, --help lists them", unknown[0], names.values())
    saved, may_change = {}, set()
    try:
        if args.resume:
            data = load_checkpoint(args.resume)[1]
            if differing := sorted(data["args"].keys() ^ names.keys()):
                fail(f"--resume {args.resume}: written by another version of this script; differing flags: {differing}")
            if len(data["ranks"]) != WORLD_SIZE:
                fail(f"--resume {args.resume}: a run of {len(data['ranks'])} processes, and this is {WORLD_SIZE}")
            saved, may_change = {**data["args"], "run_dir": args.resume}, RESUME_MAY_CHANGE  # it may have been moved
        elif args.agent:
            saved, may_change = vars(load_agent(args.agent)[1]), EVALUATE_MAY_CHANGE
            saved |= {"resume": None, "capture_video": False, "device": "auto"}
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        what = f"--resume {args.resume}" if args.resume else f"--agent {args.agent}: not an agent.pt"
        fail(f"{what}: {str(error).splitlines()[0]}")
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    for name in saved.keys() - may_change:
        if getattr(args, name) != saved[name]:
            fail(f"{names[name]} {getattr(args, name)}: the run has {saved[name]}")
    if args.env_id not in GAMES:
        fail(f"--env-id {args.env_id}: no such game, there are {', '.join(GAMES)}", args.env_id, GAMES)
    if args.distribution_mode not in GAMES[args.env_id]:
        fail(f"--distribution-mode {args.distribution_mode}: {args.env_id} has {', '.join(GAMES[args.env_id])}")
    if args.distribution_mode == "exploration" and (args.num_levels or args.start_level):
        fail("--distribution-mode exploration has a level of its own; leave --num-levels and --start-level out")
    if args.start_level and not args.num_levels:
        fail(f"--start-level {args.start_level}: only together with --num-levels")
    if args.arch == "dual" and args.detach_value != "policy":
        fail(f"--detach-value {args.detach_value}: only for --arch shared")
    rollout, processes = args.num_envs * args.num_steps, f" x {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
    if rollout % (args.num_minibatches * WORLD_SIZE):
        size = f"--num-envs {args.num_envs} x --num-steps {args.num_steps}"
        fail(f"{size} is not a multiple of --num-minibatches {args.num_minibatches}{processes}")
    divisor = args.num_aux_minibatches if args.e_aux else 1
    if args.num_envs % (divisor * WORLD_SIZE):
        fail(f"--num-envs {args.num_envs} is not a multiple of --num-aux-minibatches {divisor}{processes}")
    if (args.evaluate is None) != (args.agent is None):
        fail("--evaluate K and --agent PATH go together")
    if args.capture_video and not (args.eval_episodes or args.evaluate):
        fail("--capture-video: of what? It records evaluations; add --eval-episodes or --evaluate")
    if LOCAL_RANK == 0 and args.e_aux and not args.evaluate and args.total_timesteps <= rollout * (args.n_pi - 1):
        shorter = "" if args.resume else f" or --n-pi {math.ceil(args.total_timesteps / rollout)}"
        advice = f"--total-timesteps {args.n_pi * rollout}{shorter} would bring one"
        print(f"warning: no auxiliary phase will run, a phase has {args.n_pi} rollouts: {advice}", file=sys.stderr)
    return args


if __name__ == "__main__":
    args = parse_args()
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if RANK:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # rank 0 alone prints
    if args.evaluate:
        device, *_ = choose_device(args)
        agent, _ = load_agent(args.agent, device)
        evaluate(args, agent, device, args.evaluate, "evaluated", Path(args.agent).parent)
        raise SystemExit
    run_dir = None
    try:
        with run_directory(args) as run_dir:
            for s in (signal.SIGINT, signal.SIGTERM):
                signal.signal(s, lambda signum, _: stop(args, run_dir, signal.Signals(signum).name, 128 + signum))
            threading.excepthook = lambda _: None  # TensorBoard's thread; its errors are raised in the main thread too
            train(args, run_dir)
    except (Stopped, torch.OutOfMemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # not a full disk
        if RANK and not isinstance(error, Stopped):
            raise  # rank 0 does not know of it
        stop(args, run_dir, error, 1)
