# /// script
# requires-python = ">=3.11, <3.13"
# dependencies = ["torch==2.13.0", "procgen-mirror==0.10.7", "gym==0.26.2", "numpy<2", "tensorboard", "imageio==2.22.4",
#                 "setuptools<81"]
# ///
"""Phasic Policy Gradient (PPG) on Procgen, in one file.
The lesson ends with `train`. The rest is logging, checkpoints, evaluation, several processes and checks of flags.

    python ppg_procgen.py --env-id starpilot --arch shared        # train one network; start with this
    python ppg_procgen.py --env-id starpilot                      # train two networks, as in the paper
    python ppg_procgen.py --resume RUN_DIR                        # continue a run that was stopped
    python ppg_procgen.py --evaluate 200 --agent RUN_DIR          # see how well a trained agent plays
    torchrun --nproc-per-node 4 ppg_procgen.py --num-envs 256     # train with several processes

The function `train` is Algorithm 1 of Cobbe, Hilton, Klimov, Schulman 2020, "Phasic Policy Gradient", arXiv:2009.04416:

    for each phase:
        for N_pi iterations:                                                                       # policy phase
            roll out the policy; compute advantages A and value targets V^targ by GAE
            for E_pi epochs: maximise L^clip + beta_S * entropy  w.r.t. theta_pi
            for E_V epochs:  minimise L^value = 1/2 (V - V^targ)^2  w.r.t. theta_V
            add all (s, V^targ) to the buffer B
        pi_old = pi, for all s in B                                                                # auxiliary phase
        for E_aux epochs: minimise L^joint = 1/2 (V_aux - V^targ)^2 + beta_clone * KL[pi_old, pi]  w.r.t. theta_pi
                          and      L^value  w.r.t. theta_V

theta_pi is the policy network, which has an auxiliary value head V_aux, and theta_V is the value network. --arch shared
makes them one network, which takes half the time per step and learns almost as much. Its value loss trains only the
value head in the policy phase, and the encoder too in the auxiliary phase.
Why phases? The features that predict values help the policy too. But if one network trains on both losses at once, the
losses interfere, and both must reuse each sample equally often. The policy does best with one pass over the data, the
value function with several (paper, "Policy Sample Reuse", "Value Sample Reuse"). So the policy phase keeps the losses
apart. The auxiliary phase adds the further passes: the policy network acquires the features by learning to predict
values, while the KL term keeps the policy where the policy phase left it (pi_old).

Differences from the authors' code ("official": github.com/openai/phasic-policy-gradient, commit 7295473):
1. With one network, the value loss also trains the encoder in the auxiliary phase, as section 3.6 of the paper says.
   The official code cuts its gradient off from the encoder in that phase too (--detach-value always).
2. If E_pi and E_V differ, the official code runs all value epochs first, with a second Adam optimizer. Here, policy and
   value epochs run side by side and share one optimizer. With two networks, the result is the same. With one, our value
   head trains while the encoder is still changing.
3. The policy phase draws minibatches of single transitions. The official code draws whole segments in both phases. With
   64 environments, a policy minibatch would have only 8 of them, and learning would be slower (results/README.md).
4. Every complete policy phase is followed by an auxiliary phase. The official code stops before the last one.
5. The auxiliary phase computes in bfloat16 if the hardware can, and fp32 convolutions on CUDA use TF32 (--precision).
6. The defaults suit one machine: easy levels, 64 environments and N_pi 8. With 64 environments, N_pi 32 starts to learn
   much later. The paper's setting is --distribution-mode hard --num-envs 256 --n-pi 32 --total-timesteps 100_000_000.

Shapes: N environments of this process, T steps per rollout, M observations in a flat batch, K actions. A segment is the
T steps of one environment in one rollout, one row of an [N, T] tensor. The buffer holds S = N_pi * N segments.
"""

import argparse
import contextlib
import ctypes
import io
import math
import os
import re
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

# Idle OpenMP threads spin by default, so two runs on the same cores slow each other down.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import distributed as dist
from torch import nn
from torch.utils.tensorboard import SummaryWriter

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun


# ---------------------------------------------------------------------------------------------------------------- flags
def parse_args(argv=None):
    """Return the flags as a Namespace. With --resume or --agent, they start from the flags of that run."""
    natural, count = partial(number, int, 0, 10**9), partial(number, int, 1, 10**12)
    weight, positive = partial(number, float, 0, 1e12), partial(number, float, 1e-12, 1e12)
    fraction, switch = partial(number, float, 0, 1), argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(allow_abbrev=False, usage=argparse.SUPPRESS, formatter_class=HelpFormatter)
    parser.description, parser.epilog = __doc__.splitlines()[0], __doc__.split("\n\n")[1]
    flag = parser.add_argument_group("environment").add_argument
    flag("--env-id", default="starpilot", choices=GAMES, metavar="GAME", help=f"one of {', '.join(GAMES)}")
    flag("--distribution-mode", default="easy", help="easy, hard, or another mode that the game has (paper: hard)")
    flag("--num-levels", type=natural, default=0, help="number of training levels, 0 = all (paper: 0)")
    flag("--start-level", type=natural, default=0, help="first training level; needs --num-levels")
    flag("--num-envs", type=count, default=64, help="number of environments, over all processes (paper: 256)")
    flag("--num-steps", type=count, default=256, help="steps of each environment per rollout (paper: 256)")
    flag("--total-timesteps", type=count, default=25_000_000, help="steps of all environments together (paper: 100e6)")
    flag("--seed", type=natural, default=1, help="seed for torch, numpy and Procgen")
    flag = parser.add_argument_group("networks").add_argument
    flag("--arch", default="dual", choices=("dual", "shared"), help="two networks, or one (paper: dual)")
    detach = "when to keep the value loss from training the shared encoder (official: always, PPO: never)"
    flag("--detach-value", default="policy-phase", choices=("policy-phase", "always", "never"), help=detach)
    flag = parser.add_argument_group("policy phase").add_argument
    flag("--learning-rate", type=positive, default=5e-4, help="Adam step size (paper: 5e-4)")
    flag("--gamma", type=fraction, default=0.999, help="discount factor (paper: 0.999)")
    flag("--gae-lambda", type=fraction, default=0.95, help="lambda of generalised advantage estimation (paper: 0.95)")
    flag("--reward-norm-gamma", type=fraction, default=0.99, help="discount in reward normalisation (official: 0.99)")
    flag("--num-minibatches", type=count, default=8, help="minibatches per epoch (paper: 8)")
    flag("--clip-coef", type=weight, default=0.2, help="clip range of the probability ratio, 0 = off (paper: 0.2)")
    flag("--kl-coef", type=weight, default=0.0, help="weight of the penalty 1/2 (log ratio)^2 (paper's PPG-KL: 1)")
    flag("--ent-coef", type=weight, default=0.01, help="weight of the entropy bonus, beta_S (paper: 0.01)")
    flag("--n-pi", type=count, default=8, help="rollouts per phase, N_pi (paper: 32, with 256 environments)")
    flag("--e-pi", type=count, default=1, help="policy epochs per rollout, E_pi (paper: 1, PPO: 3)")
    flag("--e-v", type=count, default=1, help="value epochs per rollout, E_V (paper: 1, PPO: 3)")
    flag("--max-grad-norm", type=weight, default=0.0, help="limit on joint gradient norm, 0 = none (Baselines: 0.5)")
    flag = parser.add_argument_group("auxiliary phase").add_argument
    flag("--e-aux", type=natural, default=6, help="epochs per phase, E_aux, 0 = no auxiliary phase (paper: 6, PPO: 0)")
    flag("--beta-clone", type=weight, default=1.0, help="weight of KL[pi_old, pi] (paper: 1)")
    flag("--num-aux-minibatches", type=count, default=16, help="minibatches per epoch and rollout (paper: 16)")
    flag("--aux-learning-rate", type=positive, default=5e-4, help="Adam step size (paper: 5e-4)")
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--eval-episodes", type=natural, default=0, help="episodes to evaluate on after each phase, 0 = none")
    flag("--capture-video", action=switch, default=False, help="film one more episode per evaluation, 512 x 512 pixels")
    flag("--evaluate", type=count, metavar="K", help="play at least K episodes with --agent, then exit")
    flag("--agent", metavar="PATH", help="an agent.pt, or the run directory that holds it")
    flag = parser.add_argument_group("machine and output").add_argument
    flag("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto = cuda if there is a GPU")
    flag("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto = bf16 in aux. phase if supported")
    flag("--compile", action=switch, default=False, help="compile the encoders with torch.compile")
    flag("--exp-name", default=Path(__file__).stem, help="part of the default run directory's name")
    flag("--run-dir", help="output directory; None = runs/{env_id}__{exp_name}__{seed}__{time}-{pid}")
    flag("--resume", metavar="RUN_DIR", help="continue this run from its checkpoint")
    flag("--init-agent", metavar="PATH", help="start a new run from the parameters of this agent")
    flag("--checkpoint-every", type=natural, default=1, help="phases between checkpoints, 0 = no checkpoints")
    return check_flags(add_saved_flags(parser, argv))


# ------------------------------------------------------------------------------------------------------------- networks
def init_layer(layer, norm):
    """Scale the weights of each output to this L2 norm, so that its scale does not depend on the number of inputs, and
    set the biases to 0 (official torch_util.py). The heads use 0.1, which makes the first policy nearly uniform."""
    with torch.no_grad():
        rows = layer.weight.view(len(layer.weight), -1)
        rows *= norm / rows.norm(dim=1, keepdim=True)
        layer.bias.zero_()
    return layer


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))). The number of channels and the image size stay the same."""

    def __init__(self, channels):
        super().__init__()
        # The outputs of 3 * 2 blocks add up, so each is scaled by 1/sqrt(3 * 2). Within a block, the scales of the two
        # convolutions multiply, so each of them gets the square root of that.
        norm = (3**-0.5 * 2**-0.5) ** 0.5
        self.conv0 = init_layer(nn.Conv2d(channels, channels, 3, padding=1), norm)
        self.conv1 = init_layer(nn.Conv2d(channels, channels, 3, padding=1), norm)

    def forward(self, x):
        return x + self.conv1(F.relu(self.conv0(F.relu(x)), inplace=True))


class ImpalaEncoder(nn.Module):
    """The residual network of IMPALA (arXiv:1802.01561): uint8 images [M, H, W, C] -> fp32 features [M, 256]."""

    def __init__(self, observation_shape, stacks=(16, 32, 32), num_features=256):
        super().__init__()
        height, width, channels = observation_shape
        layers = []
        for out in stacks:
            layers += [init_layer(nn.Conv2d(channels, out, 3, padding=1), 1.0), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [ResidualBlock(out), ResidualBlock(out)]
            height, width, channels = (height + 1) // 2, (width + 1) // 2, out
        self.stacks = nn.Sequential(*layers)
        self.dense = init_layer(nn.Linear(channels * height * width, num_features), 1.4)
        self.to(memory_format=torch.channels_last)

    def forward(self, obs, bf16=False):
        # Permuting to [M, C, H, W] gives channels_last images without a copy.
        x = obs.permute(0, 3, 1, 2).to(torch.bfloat16 if bf16 else self.dense.weight.dtype) / 255
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=bf16):
            features = F.relu(self.dense(F.relu(self.stacks(x)).flatten(1)))
        return features.to(self.dense.weight.dtype)  # the heads stay in fp32, because ratios and KLs need its precision


class Agent(nn.Module):
    """The policy network theta_pi consists of policy_encoder, policy_head and aux_value_head, and the value network
    theta_V of value_encoder and value_head. With arch "shared", all heads share the policy encoder (section 3.6)."""

    def __init__(self, observation_shape, num_actions, arch):
        super().__init__()
        self.policy_encoder = ImpalaEncoder(observation_shape)
        width = self.policy_encoder.dense.out_features
        self.policy_head = init_layer(nn.Linear(width, num_actions), 0.1)
        self.aux_value_head = init_layer(nn.Linear(width, 1), 0.1)
        self.value_encoder = ImpalaEncoder(observation_shape) if arch == "dual" else None
        self.value_head = init_layer(nn.Linear(width, 1), 0.1)

    def forward(self, obs, bf16=False, detach_value=False):
        """uint8 images [M, H, W, C] -> logits [M, K], auxiliary values [M], values [M]."""
        features = self.policy_encoder(obs, bf16)
        logits, aux_values = self.policy_head(features), self.aux_value_head(features).squeeze(-1)
        if self.value_encoder is not None:
            features = self.value_encoder(obs, bf16)
        elif detach_value:  # the value loss then trains the value head only
            features = features.detach()
        return logits, aux_values, self.value_head(features).squeeze(-1)


# -------------------------------------------------------------------------------------------------------------- Procgen
# The modes of each game, with (R_min, R_max) for the normalised return (arXiv:1912.01588, appendix C), or None.
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
OBSERVATION_SHAPE = (64, 64, 3)


class ProcgenVectorEnv:
    """Procgen as a gym vector environment: uint8 images [N, 64, 64, 3]. The step that ends an episode returns the first
    observation of the next. Procgen does not report time limits separately, so `truncated` is always false."""

    def __init__(self, env_id, num_envs, seed, **options):
        with contextlib.redirect_stderr(io.StringIO()):  # gym complains that it is unmaintained
            from gym import spaces
            from procgen import ProcgenGym3Env
        options["num_threads"] = torch.get_num_threads()  # the results do not depend on it
        self.procgen = ProcgenGym3Env(num_envs, env_id, rand_seed=seed, **options)
        self.num_envs, self.close, self.was_reset = num_envs, self.procgen.close, False
        self.single_observation_space = spaces.Box(0, 255, OBSERVATION_SHAPE, np.uint8)
        self.single_action_space = spaces.Discrete(15)
        self.return_range = GAMES[env_id][options["distribution_mode"]]

    def reset(self, seed=None):
        """Begin new episodes -> observations, {}. The seed has no effect: Procgen takes it only at construction."""
        if self.was_reset:
            self.procgen.act(np.full(self.num_envs, -1))  # Procgen's action -1 ends the episode
        self.was_reset = True
        return self.procgen.observe()[1]["rgb"], {}

    def step(self, actions):
        """integers [N] -> observations, rewards [N], terminated [N], truncated [N], {}."""
        self.procgen.act(actions)
        rewards, obs, first = self.procgen.observe()  # `first` says which observations begin an episode
        return obs["rgb"], rewards, first, np.zeros_like(first), {}

    def state_dict(self):
        """Return the exact state of every environment. Without this method, a resumed run begins new episodes."""
        states = self.procgen.callmethod("get_state")
        return {"states": [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states]}

    def load_state_dict(self, state):
        self.procgen.callmethod("set_state", [state.numpy().tobytes() for state in state["states"]])

    def record(self, path):
        """Film episodes, the first into path-00000.mp4. This needs render_mode="rgb_array" at construction."""
        from gym3 import VideoRecorderWrapper

        warnings.filterwarnings("ignore", "pkg_resources is deprecated")
        self.procgen = VideoRecorderWrapper(self.procgen, path.parent, info_key="rgb", prefix=f"{path.name}-")


def make_envs(args, num_envs, seed, held_out=False, **options):
    """Replace this to train on something else: any gym vector environment that has uint8 images [H, W, C] and discrete
    actions, and that resets in the step that ends an episode. A truncated episode counts as ended. The name must be in
    GAMES, and the memory check counts images of OBSERVATION_SHAPE. `held_out` asks for levels not used in training."""
    start, number_of_levels = args.start_level, args.num_levels
    if held_out and number_of_levels:  # all levels after the training levels; 0 would include the training levels
        start += number_of_levels
        number_of_levels = 2**31 - 1 - start
    if args.distribution_mode != "exploration":  # exploration has only one level
        options |= {"start_level": start, "num_levels": number_of_levels}
    return ProcgenVectorEnv(args.env_id, num_envs, seed, distribution_mode=args.distribution_mode, **options)


class RewardNormalizer(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return, so that one learning rate suits all
    games. The mean stays, because subtracting it would reward or punish surviving (official reward_normalizer.py)."""

    def __init__(self, num_envs, gamma):
        super().__init__()
        self.gamma = gamma
        for name, value in ("mean", 0.0), ("var", 1.0), ("count", 1e-4):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.register_buffer("discounted_returns", torch.zeros(num_envs, dtype=torch.float64))  # of unfinished episodes

    def forward(self, rewards, dones):
        """rewards, dones [N, T] -> normalised rewards [N, T]. dones[:, t] is 1 if step t ended an episode."""
        returns = torch.empty(rewards.shape, dtype=torch.float64)
        for t in range(rewards.shape[1]):
            returns[:, t] = self.gamma * self.discounted_returns + rewards[:, t]
            self.discounted_returns = returns[:, t] * (1 - dones[:, t])
        returns = torch.cat(all_processes(returns))
        n, mean, var = returns.numel(), returns.mean(), returns.var(correction=0)
        total, delta = self.count + n, mean - self.mean
        self.var = (self.var * self.count + var * n + delta**2 * self.count * n / total) / total
        self.mean += delta * n / total
        self.count = total
        return (rewards / (self.var + 1e-8).sqrt()).clamp(-10, 10)


# ---------------------------------------------------------------------------------------------------------- mathematics
def compute_gae(rewards, values, dones, gamma, gae_lambda):
    """Generalised advantage estimation (arXiv:1506.02438): A_t = sum over l of (gamma lambda)^l delta_{t+l}.

    delta_t = r_t + gamma V_{t+1} - V_t says how much better step t went than V had predicted. With lambda 0, advantages
    rely on V and inherit its errors. With lambda 1, they rely on the rewards that follow and inherit their noise. The
    sum ends with the episode or the rollout. Going backwards, A_t = delta_t + gamma lambda A_{t+1}.

    rewards, dones [N, T], values [N, T+1] -> advantages [N, T], value targets V^targ = A + V [N, T]. dones[:, t] is 1
    if step t ended an episode; values[:, t+1] then belongs to the next episode and is ignored.
    """
    advantages, advantage = torch.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[1])):
        not_done = 1.0 - dones[:, t]
        delta = rewards[:, t] + gamma * not_done * values[:, t + 1] - values[:, t]
        advantage = delta + gamma * gae_lambda * not_done * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values[:, :-1]


@torch.no_grad()
def act(agent, obs, bf16=False, generator=None):
    """uint8 images [N, H, W, C] -> sampled actions [N], their log-probabilities [N], values [N]."""
    logits, *_, values = agent(obs, bf16)
    logprobs = F.log_softmax(logits, dim=-1)
    # With exponential noise, the argmax of p / noise is a sample from p. The noise is drawn on the CPU even with a GPU,
    # so that a checkpoint has only one generator's state to store.
    noise = torch.empty(logprobs.shape).exponential_(generator=generator).to(logprobs.device)
    actions = (logprobs.exp() / noise).argmax(-1)
    return actions, logprobs.gather(-1, actions[:, None]).squeeze(-1), values


def kl_divergence(old_logits, new_logits):
    """KL[pi_old, pi] in nats, logits [M, K] -> mean over the batch; exactly 0 if they are equal. This is the direction
    of behavioural cloning: it penalises pi for giving up actions that pi_old takes."""
    old, new = F.log_softmax(old_logits, dim=-1), F.log_softmax(new_logits, dim=-1)
    return (old.exp() * (old - new)).sum(-1).mean()


# Both losses are means over observations, as `backward_in_chunks` requires. Does the value loss train a shared encoder?
#   --detach-value           policy-phase (paper)     always (official code)     never (PPO)
#   in the policy phase      no                       no                         yes
#   in the auxiliary phase   yes                      no                         yes


def policy_phase_loss(agent, batch, args, bf16=False, train_policy=True, train_value=True):
    """-L^clip - beta_S * entropy + L^value of a flat batch {obs, actions, logprobs, advantages, targets}
    -> loss, metrics {tag: scalar}. One backward pass serves both losses, as in PPO, but no parameter gets a gradient
    from both (unless --detach-value is never). Adam skips a parameter whose gradient is None, but its momentum would
    move one whose gradient is 0. So networks whose epochs are over must get None."""
    logits, *_, values = agent(batch["obs"], bf16, detach_value=args.detach_value != "never")
    loss, metrics = 0.0, {}
    if train_policy:
        logprobs = F.log_softmax(logits, dim=-1)
        log_ratio = logprobs.gather(-1, batch["actions"][:, None]).squeeze(-1) - batch["logprobs"]
        ratio = log_ratio.exp()
        surrogate_loss = -batch["advantages"] * ratio
        if args.clip_coef > 0:  # L^clip (PPO, arXiv:1707.06347): moving a ratio beyond the range gains nothing
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            surrogate_loss = torch.maximum(surrogate_loss, -batch["advantages"] * clipped)
            metrics["losses/clipfrac"] = ((ratio - 1).abs() > args.clip_coef).float().mean()
        # The penalty approximates the KL divergence to second order (official ppo.py, compute_losses).
        policy_loss = surrogate_loss.mean() + args.kl_coef * 0.5 * log_ratio.square().mean()
        entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
        loss = policy_loss - args.ent_coef * entropy
        approx_kl = (ratio - 1 - log_ratio).mean()  # never negative, and less noisy than the mean of -log_ratio
        metrics |= {"losses/policy_loss": policy_loss, "losses/entropy": entropy, "losses/approx_kl": approx_kl}
    if train_value:
        value_loss = 0.5 * (values - batch["targets"]).square().mean()
        loss = loss + value_loss
        metrics["losses/value_loss"] = value_loss
    return loss, metrics


def auxiliary_phase_loss(agent, batch, args, bf16=False):
    """L^joint + L^value of a flat batch {obs, old_logits, targets} -> loss, metrics {tag: scalar}. The auxiliary value
    loss brings the value function's features into the policy network; nothing else uses the auxiliary values. The KL
    term, which is behavioural cloning, keeps the policy from changing."""
    logits, aux_values, values = agent(batch["obs"], bf16, detach_value=args.detach_value == "always")
    aux_value_loss = 0.5 * (aux_values - batch["targets"]).square().mean()
    kl_loss = kl_divergence(batch["old_logits"], logits)
    joint_loss = aux_value_loss + args.beta_clone * kl_loss
    value_loss = 0.5 * (values - batch["targets"]).square().mean()
    metrics = {"kl_loss": kl_loss, "aux_value_loss": aux_value_loss, "real_value_loss": value_loss}
    return joint_loss + value_loss, {f"losses/aux/{name}": value for name, value in metrics.items()}


def minibatches(data, size, device):
    """Yield all rows of data {name: [rows, ...]} once, in random order, as minibatches {name: [size, ...]}."""
    assert len({len(x) for x in data.values()}) == 1, "all tensors must have the same number of rows"
    order = torch.randperm(len(data["obs"])).to(data["obs"].device)  # copied once, because a GPU waits for each copy
    for rows in order.split(size):
        yield {name: x[rows].to(device) for name, x in data.items()}


def backward_in_chunks(loss_function, agent, minibatch, chunk_size, log, *options):
    """Add the gradient of loss_function(agent, minibatch, *options) to the parameters' .grad. Only a chunk at a time is
    in memory. The weighted sum is the minibatch's gradient, because the loss is a mean over observations."""
    for parts in zip(*(x.split(chunk_size) for x in minibatch.values())):
        chunk = dict(zip(minibatch, parts))
        loss, metrics = loss_function(agent, chunk, *options)
        weight = len(chunk["obs"]) / len(minibatch["obs"])
        (weight * loss).backward()
        log.add(metrics, weight)


# ------------------------------------------------------------------------------------------------------------- training
def train(args, run_dir):
    """Run Algorithm 1 of the paper and return the trained Agent. Everything is written into run_dir."""
    device, policy_bf16, aux_bf16, chunk_size, aux_chunk_size = choose_device(args)
    N, T = args.num_envs // WORLD_SIZE, args.num_steps  # N counts the environments of this process
    num_rollouts = math.ceil(args.total_timesteps / (args.num_envs * T))  # rounded up to whole rollouts
    has_aux_phase = args.e_aux > 0 and num_rollouts >= args.n_pi
    S = N * args.n_pi if has_aux_phase else N  # without auxiliary phases the buffer holds one rollout
    buffer_device = choose_buffer_device(args, device, S)
    seed = rank_seed(args.seed, RANK)
    np.random.seed(seed)
    torch.manual_seed(args.seed)
    envs = make_envs(args, N, seed)
    next_obs, num_actions = begin_episodes(args, envs, seed), int(envs.single_action_space.n)
    agent = make_agent(args, next_obs.shape[1:], num_actions).to(device)  # the same in all processes
    if RANK > 0:
        torch.manual_seed(seed)  # from here on, every process draws its own random numbers
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    aux_optimizer = torch.optim.Adam(agent.parameters(), lr=args.aux_learning_rate, fused=True)
    episodes, reward_normalizer = EpisodeStatistics(N), RewardNormalizer(N, args.reward_norm_gamma)
    state = {"agent": agent, "optimizer": optimizer, "aux_optimizer": aux_optimizer}
    state |= {"envs": envs, "episodes": episodes, "reward_normalizer": reward_normalizer}

    # The phase buffer (Algorithm 1's B). Rollouts write their images into it as uint8, a quarter of the size of fp32.
    aux_obs = torch.empty(S, T, *next_obs.shape[1:], dtype=torch.uint8, device=buffer_device)
    aux_targets = torch.zeros(S, T, device=buffer_device)
    old_logits = torch.zeros(S, T, num_actions, device=buffer_device)
    actions, logprobs = torch.zeros(N, T, dtype=torch.int64), torch.zeros(N, T)
    rewards, dones, values = torch.zeros(N, T), torch.zeros(N, T), torch.zeros(N, T + 1)

    announce(args, run_dir, agent, aux_obs, device, policy_bf16, aux_bf16)
    phases_done, global_step, next_obs = restore_run(args, run_dir, state, next_obs)
    save_run(args, run_dir, state, phases_done, global_step, next_obs, args.checkpoint_every > 0, new_agent=False)
    log = Log(args, run_dir, global_step, num_rollouts * args.num_envs * T)

    for phase in range(phases_done + 1, math.ceil(num_rollouts / args.n_pi) + 1):
        # ---- Policy phase (Alg. 1): N_pi iterations of rollout and update; the last phase may be shorter ----
        log.start_phase()
        iterations = min(args.n_pi, num_rollouts - (phase - 1) * args.n_pi)
        for i in range(iterations):
            # Roll out the current policy. dones[:, t] is 1 if the action taken on obs[:, t] ended an episode.
            segments = slice(i * N, (i + 1) * N) if has_aux_phase else slice(N)
            obs = aux_obs[segments]
            for t in range(T):
                obs[:, t] = torch.from_numpy(next_obs)
                actions[:, t], logprobs[:, t], values[:, t] = act(agent, obs[:, t].to(device), policy_bf16)  # GPU waits
                next_obs, reward, terminated, truncated, _ = envs.step(actions[:, t].numpy())
                rewards[:, t], dones[:, t] = torch.from_numpy(reward), torch.from_numpy(terminated | truncated)
            values[:, T] = act(agent, torch.from_numpy(next_obs).to(device), policy_bf16)[2]  # V after the last step
            global_step += args.num_envs * T
            log.lap("rollout")

            # V^targ, A <- GAE. The advantages are normalised over the full batch of all processes. Normalising each
            # minibatch would make the weight of a transition depend on the others drawn with it.
            normalized_rewards = reward_normalizer(rewards, dones)
            advantages, targets = compute_gae(normalized_rewards, values, dones, args.gamma, args.gae_lambda)
            all_advantages = torch.cat(all_processes(advantages))
            advantages = (advantages - all_advantages.mean()) / (all_advantages.std(correction=0) + 1e-8)
            aux_targets[segments] = targets  # B += (s, V^targ); the observations s are already there

            # E_pi epochs of -L^clip - beta_S * entropy w.r.t. theta_pi, E_V epochs of L^value w.r.t. theta_V, side by
            # side (difference 2), in minibatches of single transitions (difference 3).
            batch = {"obs": obs, "actions": actions, "logprobs": logprobs, "advantages": advantages, "targets": targets}
            batch = {name: x.flatten(0, 1).to(buffer_device) for name, x in batch.items()}
            for epoch in range(max(args.e_pi, args.e_v)):
                train_policy, train_value = epoch < args.e_pi, epoch < args.e_v
                options = args, policy_bf16, train_policy, train_value
                for minibatch in minibatches(batch, N * T // args.num_minibatches, device):
                    optimizer.zero_grad()
                    backward_in_chunks(policy_phase_loss, agent, minibatch, chunk_size, log, *options)
                    average_gradients(agent)
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm or math.inf)  # 0 = no limit
                    optimizer.step()
            log.lap("policy_phase")
            metrics = {"charts/learning_rate": optimizer.param_groups[0]["lr"], **episodes(rewards, dones, envs)}
            metrics["losses/explained_variance"] = explained_variance(values[:, :-1], targets)
            log.write_iteration(global_step, metrics)

        if has_aux_phase and iterations == args.n_pi:
            # ---- Auxiliary phase (Alg. 1), with an Adam optimizer of its own, as in the official code ----
            # Store pi_old(.|s) for all s in B, in the epochs' precision and chunk sizes, so that the first KL is 0.
            size = N // args.num_aux_minibatches  # segments in a minibatch
            for start in range(0, S, size):
                obs = aux_obs[start : start + size].flatten(0, 1).to(device)
                with torch.no_grad():
                    logits = [agent.policy_head(agent.policy_encoder(x, aux_bf16)) for x in obs.split(aux_chunk_size)]
                old_logits[start : start + size] = torch.cat(logits).unflatten(0, (size, T))

            # E_aux epochs of L^joint w.r.t. theta_pi and L^value w.r.t. theta_V; V^targ stays as the rollouts left it.
            buffer = {"obs": aux_obs, "old_logits": old_logits, "targets": aux_targets}
            for epoch in range(args.e_aux):
                for minibatch in minibatches(buffer, size, device):
                    minibatch = {name: x.flatten(0, 1) for name, x in minibatch.items()}  # [size, T] -> [size * T]
                    aux_optimizer.zero_grad()
                    backward_in_chunks(auxiliary_phase_loss, agent, minibatch, aux_chunk_size, log, args, aux_bf16)
                    average_gradients(agent)
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm or math.inf)
                    aux_optimizer.step()
                losses = log.print_auxiliary_epoch(phase, epoch + 1)
            log.lap("auxiliary_phase")
            log.write(losses)

        # ---- Phase boundary: the buffer is no longer needed, so a checkpoint is small and exact ----
        is_last = phase == num_rollouts // args.n_pi  # the last complete phase
        is_due = args.checkpoint_every and (phase % args.checkpoint_every == 0 or is_last)
        save_run(args, run_dir, state, phase, global_step, next_obs, can_resume=is_due and iterations == args.n_pi)
        if args.eval_episodes:
            log.write(evaluate(args, agent, device, args.eval_episodes, run_dir / f"videos/step-{global_step}"))
    log.print_summary()
    envs.close()
    return agent


# ------------------------------------------------------------------------------------ plumbing: console and TensorBoard
class EpisodeStatistics(nn.Module):
    """Returns and lengths of finished episodes, from the environments' own rewards, not the normalised ones."""

    def __init__(self, num_envs):
        super().__init__()
        self.register_buffer("running", torch.zeros(num_envs, 2, dtype=torch.float64))  # return and length so far
        self.register_buffer("recent", torch.full((100,), math.nan, dtype=torch.float64))  # the latest returns

    def forward(self, rewards, dones, envs):
        """rewards, dones [N, T] -> metrics {tag: scalar}."""
        ended = []  # (time, return, length)
        for t in range(rewards.shape[1]):
            self.running += torch.stack([rewards[:, t], torch.ones(len(rewards))], dim=1)
            done = dones[:, t] > 0
            ended += [(t, *episode) for episode in self.running[done].tolist()]
            self.running[done] = 0
        ended = [episode for part in all_processes(ended) for episode in part]
        ended.sort(key=lambda episode: episode[0])  # by time only, because `recent` must not prefer high returns
        _, returns, lengths = torch.tensor(ended, dtype=torch.float64).reshape(-1, 3).T
        self.recent = torch.cat([self.recent, returns])[-100:]
        metrics = {"charts/episodes": len(ended), "charts/episodic_return_100": self.recent.nanmean().item()}
        if ended:
            metrics |= {"charts/episodic_length": lengths.mean(), **return_metrics("charts", returns, envs)}
        return metrics


def return_metrics(group, returns, envs):
    """Return {tag: scalar}: the mean return, and its normalised value if the environments have a return_range."""
    mean, bounds = returns.mean().item(), getattr(envs, "return_range", None)
    metrics = {f"{group}/episodic_return": mean}
    if bounds is not None:
        metrics[f"{group}/normalized_return"] = (mean - bounds[0]) / (bounds[1] - bounds[0])
    return metrics


def explained_variance(values, targets):
    """Return the share of the targets' variance that the values explain; nan if all targets are equal."""
    values, targets = torch.cat(all_processes(values)), torch.cat(all_processes(targets))
    return 1 - ((targets - values).var() / targets.var()).item() if targets.var() > 0 else math.nan


def check_finite(values):
    """Raise FloatingPointError unless every value in {name: value} is finite."""
    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            raise FloatingPointError(f"{name} is not finite after step {Log.global_step}; try a smaller learning rate")


class Log:
    """Averages metrics and times, and shows them in TensorBoard and on the console."""

    global_step = 0  # on the class, so that the line after Ctrl-C can name it

    def __init__(self, args, run_dir, global_step, total_steps):
        self.run_dir, self.first_step, self.total_steps = run_dir, global_step, total_steps
        self.phase_steps, self.e_aux = args.n_pi * args.num_envs * args.num_steps, args.e_aux
        self.sums, self.phase_times = {}, []  # {tag: (sum, weight)}; for each phase {part of the algorithm: seconds}
        self.start_time, Log.global_step = time.perf_counter(), global_step
        if RANK == 0:
            self.writer = SummaryWriter(run_dir, purge_step=global_step + 1)  # hides what a killed run logged later
            flags = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
            self.writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{flags}", global_step)

    def start_phase(self):
        self.phase_times.append(Counter())
        self.lap_start = time.perf_counter()

    def lap(self, part):
        """Record the time since the last lap under this part of the algorithm."""
        seconds = time.perf_counter() - self.lap_start
        self.lap_start += seconds
        self.phase_times[-1][part] += seconds
        self.add({f"time/{part}": torch.tensor(seconds)}, 1.0)

    def add(self, metrics, weight):
        """Add {tag: scalar tensor} to the weighted means. The sums stay on the device, which spares GPU syncs."""
        for tag, value in metrics.items():
            total, weights = self.sums.get(tag, (0.0, 0.0))
            self.sums[tag] = total + weight * value.detach(), weights + weight

    def means(self):
        """Return the means {tag: float} over all processes, and reset them."""
        parts = all_processes({tag: float(total / weights) for tag, (total, weights) in self.sums.items()})  # GPU sync
        means, self.sums = {tag: sum(part[tag] for part in parts) / WORLD_SIZE for tag in parts[0]}, {}
        check_finite(means)
        return means

    def write(self, metrics):
        """Write the means and these metrics to TensorBoard, and return them."""
        metrics = self.means() | metrics
        if RANK == 0:
            for tag, value in metrics.items():
                self.writer.add_scalar(tag, value, Log.global_step)
            self.writer.flush()
        return metrics

    def write_iteration(self, global_step, metrics):
        """Write and print an iteration's metrics. In the first phase the speed leaves out the auxiliary phase."""
        Log.global_step, seconds = global_step, self.phase_times[-1].total()
        rate, left = (global_step - self.first_step) / seconds, "?"
        if len(self.phase_times) > 1:
            rate = self.phase_steps / self.phase_times[-2].total()
            steps_left = self.total_steps - self.first_step - (len(self.phase_times) - 1) * self.phase_steps
            left = timedelta(seconds=max(0, round(steps_left / rate - seconds)))
        metrics = self.write(metrics | {"charts/SPS": rate})
        line = f"step {global_step:,}/{self.total_steps:,} {global_step / self.total_steps:.1%}"
        line += f" | return {metrics['charts/episodic_return_100']:.2f} (n={metrics['charts/episodes']})"
        line += f" | kl {metrics['losses/approx_kl']:.4f} | ev {metrics['losses/explained_variance']:.2f}"
        print(f"{line} | {rate:,.0f} steps/s | left {left}")

    def print_auxiliary_epoch(self, phase, epoch):
        """Print the losses of an auxiliary epoch, and return them."""
        means = self.means()
        losses = " | ".join(f"{tag.split('/')[-1]} {mean:.4f}" for tag, mean in means.items())
        print(f"  auxiliary phase {phase}, epoch {epoch}/{self.e_aux} | {losses}")
        if len(self.phase_times) == epoch == 1 < self.e_aux:
            left = (self.e_aux - 1) * (time.perf_counter() - self.lap_start)
            print(f"  this phase ends in about {timedelta(seconds=round(left))}")
        return means

    def print_summary(self):
        """Print the time of the whole run, and the speed and the shares of its phases after the first."""
        if not self.phase_times:
            print("this run is already complete; a larger --total-timesteps extends it")
            return
        later, several = self.phase_times[1:] or self.phase_times, len(self.phase_times) > 1
        steps = self.total_steps - self.first_step - several * self.phase_steps
        seconds, wall = sum(later, Counter()), timedelta(seconds=round(time.perf_counter() - self.start_time))
        shares = ", ".join(f"{part.replace('_', ' ')} {t / seconds.total():.0%}" for part, t in seconds.items())
        rate = f"{steps / seconds.total():,.0f} steps/s {'after the first phase' if several else 'in one phase'}"
        print(f"done in {wall} | {rate} | {shares} | {self.run_dir}/agent.pt")


def announce(args, run_dir, agent, aux_obs, device, policy_bf16, aux_bf16):
    """Print what is trained, on what, and where."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    fp32 = "TF32" if device.type == "cuda" and args.precision != "fp32" else "fp32"
    line = f"{args.env_id} {args.distribution_mode}, {args.num_levels or 'all'} levels"
    line += f" | {args.arch}, {sum(p.numel() for p in agent.parameters()):,} parameters"
    line += f" | {args.num_envs} environments x {args.num_steps} steps, N_pi {args.n_pi} | {device.type} ({hardware})"
    line += f", policy phase {'bf16' if policy_bf16 else fp32}, auxiliary phase {'bf16' if aux_bf16 else fp32}"
    print(f"{line} | buffer {aux_obs.nbytes / 1e9:.2f} GB on {aux_obs.device}")
    step = args.checkpoint_every * args.n_pi * args.num_envs * args.num_steps
    checkpoint = f" | first checkpoint at step {step:,}" if step and not args.resume else ""
    print(f"run directory {run_dir}{checkpoint}")


# ------------------------------------------------------------------------------------ plumbing: run directory and files
@contextlib.contextmanager
def run_directory(args):
    """Make or reopen the run directory, and keep it locked. Every process gets its Path."""
    name = f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}-{os.getpid()}"
    run_dir = all_processes(Path(args.resume or args.run_dir or name))[0]
    try:
        lock = FileLock(run_dir / ".lock").acquire(timeout=0) if RANK == 0 else contextlib.nullcontext()
    except OSError as error:
        fail(f"cannot use {run_dir}; does another process use it? ({error})")
    with lock:
        holds_run = RANK == 0 and any(run_dir.glob("*.pt")) and not args.resume
        fail(f"{run_dir} already holds a run; --resume {run_dir} continues it", when=holds_run)
        yield run_dir


def save(path, data):
    """Write a file that is complete at every instant: write to another name, flush to the disk, then rename."""
    if RANK == 0:
        buffer, partial_path = io.BytesIO(), path.with_suffix(".partial")
        torch.save(data, buffer)  # torch.save to a file would not report a full disk
        with partial_path.open("wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        load(partial_path)  # better to fail now than when it is needed
        partial_path.replace(path)


def load(path):
    """Return what `save` wrote, and refuse files that are damaged or hold more than tensors and plain values."""
    try:
        if zipfile.ZipFile(path).testzip() is None:  # torch itself does not notice a flipped bit
            return torch.load(path, map_location="cpu", weights_only=True)
        reason = "it is damaged"
    except Exception as error:  # noqa: BLE001 - a damaged file can raise nearly anything
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"{unsafe[1]} is neither a tensor nor a plain value" if unsafe else str(error).partition("\n")[0]
    fail(f"cannot load {path}: {reason}")


def load_agent(path, device="cpu", agent=None):
    """Load an agent.pt, or the one in a run directory, into `agent` or a new Agent -> the agent, its run's flags."""
    path = Path(path, "agent.pt") if Path(path).is_dir() else Path(path)
    data = load(path)
    fail(f"{path} is not an agent.pt", when="observation_shape" not in data)
    args, parameters = argparse.Namespace(**data["args"]), data["agent"]
    agent = agent or Agent(data["observation_shape"], len(parameters["policy_head.bias"]), args.arch)
    try:
        agent.load_state_dict(parameters)
    except RuntimeError:
        fail(f"{path} is the agent of another network: it has --arch {args.arch}, or other layers")
    return agent.to(device), args


def make_agent(args, observation_shape, num_actions):
    """Return a new Agent. If the flags ask for it, it starts from --init-agent and is compiled."""
    agent = Agent(observation_shape, num_actions, args.arch)
    if args.init_agent:
        load_agent(args.init_agent, agent=agent)
    if args.compile:
        torch._dynamo.config.suppress_errors = True  # without a working compiler, torch warns and runs uncompiled
        # The heads stay eager: a compiled head that no loss reaches would get a gradient of 0 instead of None.
        for network in agent.children():
            if isinstance(network, ImpalaEncoder):
                network.compile()
    return agent


def save_run(args, run_dir, state, phase, global_step, next_obs, can_resume, new_agent=True):
    """Write agent.pt if there is a new agent, and checkpoint.pt if the run can resume from here. checkpoint.pt holds
    everything in `state` that has a state_dict."""
    check_finite(state["agent"].state_dict())
    flags = vars(args) | dict.fromkeys(("run_dir", "resume", "init_agent"))  # without this machine's paths
    content = {"args": flags, "phase": phase, "global_step": global_step, "agent": state["agent"].state_dict()}
    if can_resume:
        parts = {name: part.state_dict() for name, part in state.items() if hasattr(part, "state_dict")}
        common = {name: parts.pop(name) for name in ("agent", "optimizer", "aux_optimizer")}  # same everywhere
        parts |= {"next_obs": torch.from_numpy(next_obs), "cpu_random": torch.get_rng_state()}
        save(run_dir / "checkpoint.pt", {**content, **common, "ranks": all_processes(parts)})
    if new_agent:
        save(run_dir / "agent.pt", {**content, "observation_shape": next_obs.shape[1:]})


def restore_run(args, run_dir, state, next_obs):
    """Continue the run of --resume, if any -> phases done, global_step, the observations to go on from."""
    if not args.resume:
        return 0, 0, next_obs
    saved = load(run_dir / "checkpoint.pt")
    processes = len(saved["ranks"])
    fail(f"the saved run has {processes} processes: use torchrun with as many", when=processes != WORLD_SIZE)
    saved |= saved["ranks"][RANK]
    try:
        for name, part in state.items():
            if name in saved:
                part.load_state_dict(saved[name])
    except (RuntimeError, ValueError):
        fail(f"{run_dir} was saved by a script with another {name}; use that script")
    torch.set_rng_state(saved["cpu_random"])
    print(f"continuing from step {saved['global_step']:,}")
    if "envs" in saved:
        return saved["phase"], saved["global_step"], saved["next_obs"].numpy()
    print("warning: these environments have no state_dict, so their episodes start over")
    state["episodes"].running.zero_()
    state["reward_normalizer"].discounted_returns.zero_()
    return saved["phase"], saved["global_step"], next_obs


# ------------------------------------------------------------------------------------------------- plumbing: evaluation
def play(args, envs, agent, device, quota, seed):
    """Return the returns of `quota` episodes per environment. Taking the first to finish would favour short ones."""
    returns, running = [[] for _ in range(envs.num_envs)], np.zeros(envs.num_envs)
    generator = torch.Generator().manual_seed(seed)
    obs = begin_episodes(args, envs, seed)
    while min(map(len, returns)) < quota:
        actions = act(agent, torch.from_numpy(obs).to(device), args.precision == "bf16", generator)[0]
        obs, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        running += rewards
        for i in np.flatnonzero(terminated | truncated):
            returns[i].append(running[i])
            running[i] = 0
    envs.close()
    return np.concatenate([part[:quota] for part in returns])


def evaluate(args, agent, device, num_episodes, film):
    """Play on fresh levels -> {tag: scalar}. With --num-levels, play on the training levels and then on all others, for
    the gap. All evaluations play the same levels, with random numbers of their own. `film` is a path prefix."""
    num_envs = max(1, min(num_episodes, 64) // WORLD_SIZE)
    quota = math.ceil(num_episodes / (num_envs * WORLD_SIZE))
    seed, means = rank_seed(args.seed, 1000 + RANK), {}
    for levels in ("training", "held-out") if args.num_levels else ("fresh",):  # fresh: any level, another seed
        envs = make_envs(args, num_envs, seed, held_out=levels != "training")
        returns = np.concatenate(all_processes(play(args, envs, agent, device, quota, seed)))
        metrics, error = return_metrics("eval", returns, envs), returns.std() / math.sqrt(len(returns))
        means[levels] = metrics["eval/episodic_return"]
        score = f", normalised {metrics['eval/normalized_return']:.3f}" if len(metrics) > 1 else ""
        line = f"return {means[levels]:.2f} +- {error:.2f}{score}, {len(returns)} episodes"
        print(f"  evaluation on {levels} levels: {line}")
    if args.num_levels:
        metrics["eval/generalization_gap"] = means["training"] - means["held-out"]
    if args.capture_video and RANK == 0:
        envs = make_envs(args, 1, seed, held_out=True, render_mode="rgb_array")
        envs.record(film)
        play(args, envs, agent, device, 1, seed)
        print(f"  film: {film}-00000.mp4")
    return metrics


# ----------------------------------------------------------------------- plumbing: several processes, device and memory
def all_processes(value):
    """Return a list of every process's value, ordered by rank."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def average_gradients(agent):
    """Average the gradients over all processes. DistributedDataParallel would do so after every chunk, and it
    expects a gradient for every parameter."""
    gradients = [p.grad for p in agent.parameters() if p.grad is not None] if WORLD_SIZE > 1 else []
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= WORLD_SIZE


def rank_seed(seed, rank):
    """Return a different seed for every rank; rank 0 keeps the seed itself."""
    return int(np.random.SeedSequence((seed, rank)).generate_state(1)[0] // 2) if rank > 0 else seed


def choose_device(args):
    """Return the device, and for the policy phase and the auxiliary phase whether they use bf16, and how many
    observations a pass takes."""
    use_gpu = torch.cuda.is_available() and args.device != "cpu"
    fail("--device cuda: torch finds no GPU; leave the flag out", when=args.device == "cuda" and not use_gpu)
    if use_gpu:
        local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        fail(f"this machine has {num_gpus} GPUs, fewer than processes", when=local_rank >= num_gpus)
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.allow_tf32 = args.precision != "fp32"  # convolutions are 98 % of the arithmetic
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
        # glibc gives large freed blocks back to the kernel, so every chunk has to fault its memory in again. Telling it
        # to keep them makes training passes 1.3 times as fast (2 cores, AMX).
        with contextlib.suppress(OSError, AttributeError):  # not every system has glibc
            ctypes.CDLL("libc.so.6").mallopt(-4, 0)  # malloc.h: M_MMAP_MAX
            ctypes.CDLL("libc.so.6").mallopt(-1, 2**31 - 1)  # malloc.h: M_TRIM_THRESHOLD
    aux_bf16 = args.precision == "bf16" or (args.precision == "auto" and has_bf16)
    # These chunks are within 3 % of the fastest on a CPU, and need 3.0 GB on an H200.
    chunk_size = (256 if args.arch == "shared" else 128) * (4 if use_gpu else 1)
    aux_chunk_size = chunk_size * (4 if use_gpu and aux_bf16 else 1)
    return torch.device("cuda" if use_gpu else "cpu"), args.precision == "bf16", aux_bf16, chunk_size, aux_chunk_size


def free_memory(root="/"):
    """Return how many bytes this process can still allocate, or infinity if that is unknown (not on Linux)."""
    free, root = math.inf, Path(root)
    with contextlib.suppress(OSError):
        free = 1024 * int(re.search(r"MemAvailable: +(\d+)", (root / "proc/meminfo").read_text())[1])
        own_group = (root / "proc/self/cgroup").read_text().strip().removeprefix("0::/")
        for group in (root / "sys/fs/cgroup" / own_group / "memory.max").parents:  # each can have a limit (cgroups v2)
            with contextlib.suppress(OSError, ValueError):  # this group does not exist, or its limit is "max"
                used, limit = (int((group / f"memory.{name}").read_text()) for name in ("current", "max"))
                cached = int(re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())[1])
                free = min(free, limit - used + cached)
    return free


def choose_buffer_device(args, device, num_segments):
    """Return a device with enough memory for the phase buffer, or end the run before it allocates anything large."""
    needed = num_segments * args.num_steps * math.prod(OBSERVATION_SHAPE)
    free = min(all_processes(free_memory())) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda" and needed + 4e9 < torch.cuda.mem_get_info()[0]:  # training itself takes up to 4 GB
        return device
    needed += 1.5e9  # for everything else
    message = f"training needs {needed / 1e9:.1f} GB of memory but only {free / 1e9:.1f} GB are free"
    fail(f"{message}: lower --n-pi or --num-envs", when=needed > free)
    return torch.device("cpu")


# ---------------------------------------------------------------------------------------------- plumbing: flags, checks
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and keeps the line breaks of the examples."""


def fail(message, when=True):
    """If `when` is true, end the run with one line on stderr and exit status 2."""
    if when:
        print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def number(kind, low, high, text):
    """Turn the text of a flag into a number. A whole number may be written 64, 25_000_000 or 25e6."""
    with contextlib.suppress(ValueError):
        if low <= float(text) <= high and kind(float(text)) == float(text):
            return kind(float(text))
    name = "whole number" if kind is int else "number"
    raise argparse.ArgumentTypeError(f"{text} is not a {name} from {low:g} to {high:g}")


def add_saved_flags(parser, argv):
    """Parse the flags. With --resume or --agent, the defaults are that run's flags; --resume lets only a few change."""
    args = parser.parse_args(argv)
    fail("--evaluate K and --agent PATH go together", when=(args.evaluate is None) != (args.agent is None))
    fail("--agent evaluates, so use it without --resume", when=args.resume is not None and args.agent is not None)
    if args.resume is None and args.agent is None:
        return args
    if args.agent is not None:
        saved = vars(load_agent(args.agent)[1]) | {"capture_video": False, "device": "auto"}
        may_change = {"env_id", "distribution_mode", "num_levels", "start_level", "seed", "precision"}
        may_change |= {"device", "capture_video", "evaluate", "agent"}
    else:
        saved = load(Path(args.resume, "checkpoint.pt"))["args"] | {"run_dir": args.resume}
        may_change = {"total_timesteps", "checkpoint_every", "device", "eval_episodes", "capture_video", "resume"}
    for name in sorted(vars(args).keys() ^ saved.keys()):
        who, value = "the saved run" if name in saved else "this script", (vars(args) | saved)[name]
        print(f"warning: only {who} knows the flag {name}, which is {value}")
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    for name in sorted(saved.keys() - may_change):
        message = f"{name} is {saved[name]} in the saved run, and only {', '.join(sorted(may_change))} may change"
        fail(f"{message}; --init-agent begins a new run from an agent", when=getattr(args, name) != saved[name])
    return args


def check_flags(args):
    """Return the flags, or end the run if they do not fit together."""
    modes, exploration = GAMES[args.env_id], args.distribution_mode == "exploration"
    parts, aux_parts = args.num_minibatches * WORLD_SIZE, (args.num_aux_minibatches if args.e_aux else 1) * WORLD_SIZE
    rollout, evaluates = args.num_envs * args.num_steps, args.eval_episodes or args.evaluate
    fail(f"{args.env_id} only has the modes {', '.join(modes)}", when=args.distribution_mode not in modes)
    fail("exploration mode has a single, fixed level", when=exploration and (args.num_levels or args.start_level))
    fail("--start-level needs --num-levels", when=args.start_level and not args.num_levels)
    fail("--detach-value needs --arch shared", when=args.arch == "dual" and args.detach_value != "policy-phase")
    fail(f"--num-envs x --num-steps is no multiple of {parts} (--num-minibatches x processes)", when=rollout % parts)
    remainder = args.num_envs % aux_parts
    fail(f"--num-envs is no multiple of {aux_parts} (--num-aux-minibatches x processes)", when=remainder)
    fail("--capture-video needs --eval-episodes or --evaluate", when=args.capture_video and not evaluates)
    if args.e_aux and not args.evaluate and args.total_timesteps <= rollout * (args.n_pi - 1):
        advice = f"--total-timesteps {args.n_pi * rollout} or --n-pi {math.ceil(args.total_timesteps / rollout)}"
        print(f"warning: this run is too short for an auxiliary phase, which takes {advice}")
    return args


def begin_episodes(args, envs, seed):
    """Return the first observations, or end the run if it cannot use these environments or would misread them."""
    (obs, _), action_space = envs.reset(seed=seed), envs.single_action_space
    is_images = obs.dtype == np.uint8 and obs.ndim == 4 and len(obs) == envs.num_envs and obs.shape[1] >= obs.shape[3]
    wanted, found = f"uint8 images [{envs.num_envs}, H, W, C], channels last", f"{obs.dtype} {obs.shape}"
    fail(f"observations must be {wanted}, not {found}", when=not is_images)
    is_discrete = type(action_space).__name__ == "Discrete" and getattr(action_space, "start", 0) == 0
    fail(f"actions must be Discrete and begin with 0, not {action_space}", when=not is_discrete)
    autoreset = str((getattr(envs, "metadata", None) or {}).get("autoreset_mode", "same"))
    fail(f"the autoreset mode must be SAME_STEP, not {autoreset}", when="same" not in autoreset.lower())
    fail("--capture-video needs a method `record`", when=args.capture_video and not hasattr(envs, "record"))
    return obs


if __name__ == "__main__":
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - only rank 0 prints
    sys.stdout.reconfigure(line_buffering=True)  # for a log file or a pipe, too
    args = parse_args()
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if args.evaluate:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C has nothing to save or to say
        path, device = Path(args.agent), choose_device(args)[0]
        print(f"{path}: {args.env_id} {args.distribution_mode}, at least {args.evaluate} episodes")
        folder = (path if path.is_dir() else path.parent) / "videos"
        film = folder / f"{path.stem}-{time.strftime('%Y-%m-%d-%H-%M-%S')}"
        evaluate(args, load_agent(path, device)[0], device, args.evaluate, film)
        sys.exit()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt, as Ctrl-C does
    with run_directory(args) as run_dir:
        try:
            train(args, run_dir)
        except KeyboardInterrupt:  # at any moment, because checkpoint.pt is complete at every instant
            path = run_dir / "checkpoint.pt"
            saved = f"up to step {load(path)['global_step']:,}: --resume {run_dir}" if path.exists() else "nothing"
            sys.exit(f"\nstopped at step {Log.global_step:,}, saved {saved}" if RANK == 0 else 1)
