"""AS-LoRA (arXiv 2605.05769): the server chooses, layer by layer and round by round, which factor is trained.

Every client scores its active factors by the squared norm of its last noisy gradient, less what
the noise alone adds to it. The server keeps a moving average for each factor of each layer, and
draws the next round's factors by the softened difference. Scores are functions of gradients that
are private already, so they cost no privacy. In a round all clients train the same factor of a
layer, so averaging is exact.

With `curvature` a score is multiplied by 1 - rate / 2 * curvature along the noisy gradient: the
share of the first-order gain that a step keeps where the loss bends. The loss is that of public
records at the client's adapter, which earlier noisy gradients made: nothing here touches a private
record, so it is post-processing too. The losses of private records would be a query of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedpipe.client.curvature import Curvature
from fedpipe.client.schedule import Decision, Modes, Schedule
from fedpipe.models import steady
from fedpipe.models.factors import layer_of
from fedpipe.models.lora import TensorSpec

Share = Annotated[float, Field(ge=0, le=1)]


class Adaptive(Schedule):
    """Train the factor that had the larger noisy gradient, drawn for each layer and round (AS-LoRA).

    Parameters
    ----------
    warm_up : share of the rounds, and at least two of them, in which all layers alternate B, A, B, A
    temperature, cooling, coldest : round t after the warm-up has max(coldest, temperature * cooling^t)
    smoothing : weight of the past in the moving average of a factor's scores
    exploration : share of the draws that are a fair coin, so that no score goes stale
    projection : score a random projection of the gradient, as the authors' code does
    curvature : also weigh scores by the curvature of the loss on `probe`
    probe : a file of public records, relative to `params.yaml`, with the columns and labels of the data
    curvature_rounds : share of the rounds, the last ones and at least one, in which curvature is measured;
        the last round's scores decide nothing any more
    """

    name = "adaptive"
    together = False
    warm_up: Share = 0.1
    temperature: Annotated[float, Field(gt=0)] = 1.0
    cooling: Annotated[float, Field(gt=0, le=1)] = 0.95
    coldest: Annotated[float, Field(gt=0)] = 0.1
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    exploration: Share = 0.05
    projection: bool = False
    curvature: bool = False
    probe: str | None = None
    curvature_rounds: Annotated[float, Field(gt=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _check_probe(self) -> Adaptive:
        if self.curvature and self.probe is None:
            raise ValueError(
                "curvature: found true without a probe; expected probe: FILE of public records beside it, since "
                "losses of private records are not private"
            )
        if self.probe is not None and not self.curvature:
            raise ValueError(f"probe: found '{self.probe}' with curvature off, which needs none; set curvature to true")
        return self

    @property
    def public(self) -> str | None:
        return self.probe

    def probes(self, round: int, rounds: int) -> bool:
        return self.curvature and round > rounds - max(1, math.floor(self.curvature_rounds * rounds))

    def is_active(self, round: int, step: int, spec: TensorSpec, modes: Modes) -> bool:
        return spec.factor not in ("A", "B") or spec.factor == modes.get(layer_of(spec), _alternating(round))

    def modes(self, decision: Decision) -> dict[str, str]:
        layers = _layers(decision.specs)
        warm_up = max(2, math.floor(self.warm_up * decision.rounds))
        if decision.round <= warm_up:
            return dict.fromkeys(layers, _alternating(decision.round))
        temperature = max(self.coldest, self.temperature * self.cooling ** (decision.round - warm_up))
        averages = decision.memory.get("scores", {})
        chosen = {}
        for number, layer in enumerate(layers):
            scores = averages.get("A", {}).get(layer), averages.get("B", {}).get(layer)
            chance = self.exploration / 2 + (1 - self.exploration) * probability_of_a(*scores, temperature)
            draw = np.random.default_rng([decision.seed, decision.round, number]).random()
            chosen[layer] = "A" if draw < chance else "B"
        return chosen

    def score(
        self,
        gradients: Mapping[str, Tensor],
        active: Sequence[TensorSpec],
        stds: Sequence[float],
        curvature: Curvature | None = None,
    ) -> list[dict[str, float]]:
        scores: list[dict[str, float]] = [{} for _ in stds]
        for spec in (spec for spec in active if spec.factor in ("A", "B")):
            gradient = gradients[spec.name]
            # Clients of lower rank have fewer numbers, and zeros for the others.
            numbers = gradient.flatten(1).count_nonzero(1).double().cpu().numpy()
            scored = _projected(gradient, spec) if self.projection else gradient
            energies = steady.squares(scored).cpu().numpy()
            excess = np.maximum(energies - numbers * np.square(np.asarray(stds)), 0.0)
            for row, (client, value) in enumerate(zip(scores, excess.tolist(), strict=True)):
                if curvature is not None and value:
                    value *= 1 - curvature.rate / 2 * curvature.along(row, spec, gradient[row])
                client[layer_of(spec)] = client.get(layer_of(spec), 0.0) + value
        return scores

    def remember(self, decision: Decision, modes: Modes, scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        averages = {factor: dict(decision.memory.get("scores", {}).get(factor, {})) for factor in ("A", "B")}
        for layer, factor in modes.items():
            new = [client[layer] for client in scores if layer in client]
            if not new:
                continue
            mean, old = math.fsum(new) / len(new), averages[factor].get(layer)
            averages[factor][layer] = mean if old is None else self.smoothing * old + (1 - self.smoothing) * mean
        return {**decision.memory, "scores": averages}


def probability_of_a(score_a: float | None, score_b: float | None, temperature: float) -> float:
    """Return the probability of training A: a sigmoid of the scores' relative difference over the temperature.

    A factor that was never trained has no score (None); the other is then taken.
    """
    if score_a is None or score_b is None:
        return 0.5 if score_a is score_b else float(score_b is None)
    difference = (score_a - score_b) / (abs(score_a) + abs(score_b) + 1e-8)
    return 1 / (1 + math.exp(-min(30.0, max(-30.0, difference / temperature))))


def _alternating(round: int) -> str:
    return "B" if round % 2 else "A"


def _layers(specs: Sequence[TensorSpec]) -> list[str]:
    return list(dict.fromkeys(layer_of(spec) for spec in specs if spec.factor in ("A", "B")))


def _projected(gradient: Tensor, spec: TensorSpec) -> Tensor:
    """Return g R for A, R g for B, with R a fixed square Gaussian matrix of variance 1 / width."""
    size = spec.shape[1] if spec.factor == "A" else spec.shape[0]
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(size)) / math.sqrt(size)
    matrix = matrix.to(gradient)
    if spec.factor == "A":
        return steady.linear(gradient, matrix.T, None)
    return steady.linear(gradient.transpose(1, 2), matrix, None).transpose(1, 2)
