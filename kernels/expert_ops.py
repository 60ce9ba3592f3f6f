"""The ops of a mixture of experts, on the terms of ops.py.

Shapes: T tokens, D hidden, N experts, K of them for each token, I intermediate features.
"""

# mypy: disable-error-code="return"

from __future__ import annotations

from torch import Tensor

from .argument_checks import check_linear
from .arguments import ClampedSwiGLU, ExpertMatrix, Scoring
from .expert_checks import check_experts, check_selection
from .ops import op


@op("expert_routing")
def select_experts(
    logits: Tensor,
    count: int,
    *,
    normalized: bool,
    scoring: Scoring = "softmax",
    logit_bias: Tensor | None = None,
    bias: Tensor | None = None,
    least_sum: float = 0.0,
    scaling: float = 1.0,
    first_expert: int = 0,
    has_shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the `count` best experts of each token, [T, K] int64, best first, and their scores, [T, K] float32.

    logits        [T, N]  floating point, rows may have any stride; on a GPU N is at most 512, and of experts with
                  equal logits the lesser wins
    scoring       the scores are the softmax of the logits, or the sigmoid of each
    logit_bias    [N] in the logits' dtype, is added to them; [N + 1] with has_shared
    bias          [N] or [T, N] float32: is added to the scores to find the best experts, and not returned
    normalized    the scores are divided by their sum, or by least_sum if that is more; then they are times `scaling`
    first_expert  is subtracted from the numbers that are returned
    has_shared    logits are [T, N + 1]: each token also has expert N, last, whose score is the sigmoid of its logit
    """
    check_selection(logits[:, :-1] if has_shared else logits, count, bias)


@op("expert_routing")
def route_tokens(
    x: Tensor,
    weight: Tensor,
    count: int,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    logit_bias: Tensor | None = None,
    normalized: bool,
    scoring: Scoring = "softmax",
    bias: Tensor | None = None,
    least_sum: float = 0.0,
    scaling: float = 1.0,
    first_expert: int = 0,
    has_shared: bool = False,
    num_padding: int = 0,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [T, D], normed by `norm` if there is one, and `select_experts` of `x @ weight.T + logit_bias`.

    weight [N, D] and logit_bias [N] have a row more with has_shared. The last num_padding rows of weight are ignored:
    cuBLAS is up to ten times faster if its rows are a multiple of 8. Up to 8 tokens take one launch on a GPU.
    """
    check_linear(x, weight, norm, None, None, gated=False)


@op("expert_gemm")
def experts(
    x: Tensor,
    expert_ids: Tensor,
    scores: Tensor,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    swiglu: ClampedSwiGLU | None = None,
    add_to: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Return `out[t] = sum over k of scores[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t]))`, [T, D].

    e is `expert_ids[t, k]`.

    expert_ids     [T, K] int64; a number outside [0, N) adds nothing; scores [T, K] float32
    gate_up, down  [N, 2 I, D], rows of gate, then of up, and [N, D, I]; contiguous; the biases [N, 2 I] and [N, D]
    swiglu         takes the place of `silu(gate) * up`
    add_to         [T, D] is added to the result, which overwrites it
    The result has x's dtype; all sums are in float32. On a GPU, rows of D and I must be whole vectors of 16 bytes
    (multiples of 8 in bfloat16), and MXFP4 needs x in bfloat16. No launch depends on the routing. A token is bitwise
    identical in any batch with batch_invariant only, which is slower for few tokens.
    """
    check_experts(x, expert_ids, scores, gate_up, down, gate_up_bias, down_bias, add_to)
