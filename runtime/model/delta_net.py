"""A layer of the gated delta rule: linear attention with a state of fixed size for each request.

Shapes: T tokens, D hidden, Hk and Hv key and value heads of this rank, E and Ev their sizes.
"""

from __future__ import annotations

from ...comm.base import Communicator
from ...kernels.arguments import DeltaLayer
from .linear import ColumnLinear, Projection, RowLinear, projections
from .model_config import ModelConfig
from .norm import NormInput, Residual
from .rank_shares import share
from .state_pool import LayerStates
from .weights import Piece, Weights


class GatedDeltaNet:
    """Projections, a causal convolution of q, k and v, the gated delta rule, its gated norm, output projection.

    A rank has some key heads and all value heads that use them.
    """

    def __init__(self, weights: Weights, comm: Communicator, config: ModelConfig, name: str) -> None:
        net = config.delta_net
        assert net is not None
        name = f"{name}.linear_attn"
        keys, group = share(net.key_heads, comm.rank, comm.size), net.value_heads // net.key_heads
        heads = slice(keys.start * group, keys.stop * group)
        key_rows = slice(keys.start * net.key_size, keys.stop * net.key_size)
        value_rows = slice(heads.start * net.value_size, heads.stop * net.value_size)
        key_features, value_features = net.key_heads * net.key_size, net.value_heads * net.value_size
        features = key_features, key_features, value_features
        qkv = projections([f"{name}.in_proj_qkv"], features, (key_rows, key_rows, value_rows))
        z = Projection(f"{name}.in_proj_z", value_features, value_rows)
        gates = [Projection(f"{name}.in_proj_{gate}", net.value_heads, heads) for gate in "ba"]
        # FP8 checkpoints may leave the gates in 16 bits.
        joined, apart = ([*qkv, z, *gates], []) if weights.quantization is None else ([*qkv, z], gates)
        self.inputs = ColumnLinear(weights, joined, config.hidden_size, bias=False)
        self.gates = ColumnLinear(weights, apart, config.hidden_size, bias=False) if apart else None
        self.channels, self.num_gates = sum(part.num_rows for part in qkv), 2 * (heads.stop - heads.start)
        shape, pieces, start = (sum(features), 1, net.taps), [], 0
        for part in qkv:
            pieces.append(Piece(f"{name}.conv1d.weight", shape, (part.rows,), (slice(start, start + part.num_rows),)))
            start += part.num_rows
        taps = weights.add((self.channels, 1, net.taps), pieces).squeeze(1)
        parameters = [
            Piece(f"{name}.{part}", (net.value_heads,), (heads,), (n,)) for n, part in enumerate(("A_log", "dt_bias"))
        ]
        decay = weights.add((2, heads.stop - heads.start), parameters)
        norm = Piece(f"{name}.norm.weight", (net.value_size,))
        norm_weight = weights.add((net.value_size,), [norm], is_norm=True, is_zero_centred=False)
        self.batch_invariant = weights.batch_invariant
        self.layer = DeltaLayer(taps, decay, norm_weight, config.norm_eps)
        output = f"{name}.out_proj"
        self.output = RowLinear(weights, comm, output, config.hidden_size, value_features, value_rows, bias=False)

    def __call__(self, normed: NormInput, residual: Residual, states: LayerStates) -> None:
        """Add the layer's result for `normed` [T, D] to `residual`; update the states of the batch's rows."""
        mixed = self.inputs(normed)
        if self.gates is None:
            mixed, gates = mixed[:, : -self.num_gates], mixed[:, -self.num_gates :]
        else:
            gates = self.gates(normed)
        qkv, z = mixed[:, : self.channels], mixed[:, self.channels :]
        memory = states.inputs, states.sums, states.rows
        out = states.delta_net(qkv, z, gates, self.layer, *memory, batch_invariant=self.batch_invariant)
        self.output(out, residual)
