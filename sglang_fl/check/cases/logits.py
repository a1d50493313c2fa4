# SPDX-License-Identifier: Apache-2.0
"""SGLang's kernels between the logits and the sampled token."""

from dataclasses import dataclass

import torch

from ..exact import logits as exact
from .call import Call, Draw, Form, Layer, Operator
from .models import numbers


@dataclass(frozen=True)
class SoftCap(Form):
    """Logits ``[tokens, vocabulary]``. With ``layout`` view or odd-view they are a slice of wider rows."""

    vocabulary: int = 300
    cap: float = 30.0

    def call(self, draw: Draw) -> Call:
        logits = self.drawn(draw, self.tokens, self.vocabulary, scale=2 * self.cap)
        inputs = {"grid": None, "full_logits": logits, "final_logit_softcapping": self.cap}
        return Call(Layer(), inputs, frozenset({"full_logits"}), updated=("full_logits",), takes_layer=False, returns=False)


@dataclass(frozen=True)
class Hash(Form):
    """A hash of each token's 64-bit seed and position, and each column. ``seeds``: the dtype of the seeds."""

    columns: int = 300
    seeds: str = "uint64"

    def call(self, draw: Draw) -> Call:
        seeds = torch.randint(-(2**63), 2**63 - 1, (self.tokens,), generator=draw.rng)
        positions = torch.randint(2**31 - 1, (self.tokens,), generator=draw.rng)
        inputs = {
            "grid": None,
            "seed": draw.place(seeds.view(getattr(torch, self.seeds)), getattr(torch, self.seeds)),
            "positions": draw.place(positions),
            "col_indices": draw.place(torch.arange(self.columns), torch.int64),
        }
        return Call(Layer(), inputs, takes_layer=False)


OPERATORS = {
    "sglang.kernels.ops.activation.softcap:softcap_inplace_logits": Operator(
        SoftCap(),
        "vocabulary=1024",
        exact.softcap,
        sizes=f"tokens=2 vocabulary={{{numbers('vocabulary')}}} | layout=far",
        many="tokens={4097,65537} vocabulary=8 | tokens=65537 vocabulary=8 layout=view",
        vast="tokens=8200 vocabulary=262144",
        unusual="tokens=0 | vocabulary=1 | vocabulary=1027 | layout={view,odd-view} | cap=50",
        special="tokens=6 values={nan,largest,zeros,denormals}",
        compiled=False,
        tokens_in={"full_logits": 0},
    ),
    "sglang.kernels.ops.sampling.murmur_hash:murmur_hash32": Operator(
        Hash(),
        "columns=1024",
        exact.murmur_hash,
        sizes=f"tokens=2 columns={{{numbers('vocabulary')}}}",
        many="tokens={4097,65537} columns=8",
        unusual="tokens=0 | columns=0 | columns=1 | columns=1027 | seeds=int64",
        compiled=False,
        dtypes=(torch.int64, torch.int32),
        tokens_in={"seed": 0, "positions": 0},
    ),
}
