// The choice of a token's experts by one warp.
#pragma once
#include "common.cuh"

// Return a number that is greater for a greater x, and greater than 0.
DEVICE unsigned order_key(float x) {
    const unsigned bits = __float_as_int(x + 0.f);  // -0 becomes 0
    return bits ^ ((int)bits < 0 ? 0xffffffffu : 0x80000000u);
}

// What a choice depends on: `bias` is added to the scores for the choice if it is not null. `scaling` multiplies the scores.
// first_expert is subtracted from the numbers that are written. If `shared` is 1, a row of logits has one more: its sigmoid is the score
// of expert `experts`, which each token has after the others.
struct Choice {
    const float* bias;
    float least_sum, scaling;
    int experts, choices, first_expert, shared;
};

constexpr unsigned NUMBERS = 0x1fff;  // the last bits of the order key of a logit in 16 bits: they have room for an expert's number

DEVICE float logit_of(unsigned key) {  // of an order key with a number
    return __int_as_float((int)key < 0 ? (key & ~NUMBERS) ^ 0x80000000u : ~(key | NUMBERS));
}

// Do choose_experts for up to 32 choices by logits in 16 bits alone. A lane sorts its experts, so that each choice takes one reduction.
template <int PER_LANE, bool NORMALIZED, bool SIGMOID, typename F>
DEVICE void choose_by_logits(long long* expert_ids, float* scores, const Choice& choice, F logit) {
    const int lane = threadIdx.x % 32, experts = choice.experts;
    float x[PER_LANE];
    unsigned order[PER_LANE];  // 0: no expert
    UNROLL for (int i = 0; i < PER_LANE; ++i) x[i] = lane + 32 * i < experts ? logit(lane + 32 * i) : -infinity();
    const float shared_logit = choice.shared ? logit(experts) : 0.f;
    UNROLL for (int i = 0; i < PER_LANE; ++i)  // of equal experts the first has the greatest key
        order[i] = lane + 32 * i < experts ? (order_key(x[i]) & ~NUMBERS) | (NUMBERS - lane - 32 * i) : 0;
    UNROLL for (int pass = 0; pass < PER_LANE; ++pass)
        UNROLL for (int i = pass % 2; i + 1 < PER_LANE; i += 2) {
            const unsigned greater = max(order[i], order[i + 1]);
            order[i + 1] = min(order[i], order[i + 1]), order[i] = greater;
        }
    unsigned mine = 0, first = 0;  // keys of choice `lane`, and of the first one
    for (int n = 0; n < choice.choices; ++n) {
        const unsigned best = __reduce_max_sync(0xffffffffu, order[0]);
        if (n == 0) first = best;
        if (lane == n) mine = best;
        if (order[0] == best) {
            UNROLL for (int i = 0; i + 1 < PER_LANE; ++i) order[i] = order[i + 1];
            order[PER_LANE - 1] = 0;
        }
    }
    const float greatest = logit_of(first);
    const auto score_of = [&](float x) { return SIGMOID ? 1.f / (1.f + __expf(-x)) : __expf(x - greatest); };
    const float score = lane < choice.choices ? score_of(logit_of(mine)) : 0.f;
    float divisor = 1.f;
    if (!SIGMOID && (!NORMALIZED || choice.least_sum > 0.f)) {
        float sum = 0.f;
        UNROLL for (int i = 0; i < PER_LANE; ++i) sum += score_of(x[i]);
        divisor = warp_sum(sum);
    }
    if (NORMALIZED) divisor = fmaxf(warp_sum(score), choice.least_sum * divisor);
    if (lane < choice.choices) {
        expert_ids[lane] = (int)(NUMBERS - (mine & NUMBERS)) - choice.first_expert;
        scores[lane] = score * (choice.scaling / divisor);
    }
    if (choice.shared && lane == choice.choices) {
        expert_ids[lane] = experts - choice.first_expert;
        scores[lane] = 1.f / (1.f + __expf(-shared_logit));
    }
}

// Write the `choices` experts of a token with the greatest scores, and their scores: sigmoid(logit), or the softmax of all logits.
// NORMALIZED divides them by their sum, which is at least least_sum. logit(i) is that of expert i; a lane has the experts lane,
// lane + 32, ...
template <int PER_LANE, bool NORMALIZED, bool SIGMOID, typename F>
DEVICE void choose_experts(long long* expert_ids, float* scores, const Choice& choice, F logit) {
    const int lane = threadIdx.x % 32, experts = choice.experts;
    float key[PER_LANE], score[PER_LANE], greatest = -infinity(), sum = 0.f;
    UNROLL for (int i = 0; i < PER_LANE; ++i) {
        const int expert = lane + 32 * i;
        key[i] = expert < experts ? logit(expert) : -infinity();
        greatest = fmaxf(greatest, key[i]);
    }
    const float shared_logit = choice.shared ? logit(experts) : 0.f;
    for (int n = 16; n > 0; n >>= 1) greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, n));
    UNROLL for (int i = 0; i < PER_LANE; ++i) {
        score[i] = SIGMOID ? 1.f / (1.f + __expf(-key[i])) : __expf(key[i] - greatest);
        sum += score[i];
    }
    float divisor = SIGMOID ? 1.f : warp_sum(sum);
    if (choice.bias) {
        UNROLL for (int i = 0; i < PER_LANE; ++i) {
            const int expert = lane + 32 * i;
            score[i] /= divisor;
            if (expert < experts) key[i] = score[i] + choice.bias[expert];
        }
        divisor = 1.f;
    }
    unsigned order[PER_LANE];  // 0: chosen, or no expert
    int place[PER_LANE];       // among the choices, or -1
    UNROLL for (int i = 0; i < PER_LANE; ++i) {
        order[i] = lane + 32 * i < experts ? order_key(key[i]) : 0;
        place[i] = -1;
    }
    sum = 0.f;
    for (int n = 0; n < choice.choices; ++n) {
        unsigned best = 0;
        UNROLL for (int i = 0; i < PER_LANE; ++i) best = max(best, order[i]);
        best = __reduce_max_sync(0xffffffffu, best);
        int first = PER_LANE;  // of the lane's experts that are as good
        UNROLL for (int i = PER_LANE - 1; i >= 0; --i)
            if (order[i] == best) first = i;
        const int expert = __reduce_min_sync(0xffffffffu, lane + 32u * first);
        UNROLL for (int i = 0; i < PER_LANE; ++i)
            if (expert == lane + 32 * i) sum += score[i], order[i] = 0, place[i] = n;
    }
    if (NORMALIZED) divisor = fmaxf(warp_sum(sum), choice.least_sum * divisor);
    UNROLL for (int i = 0; i < PER_LANE; ++i)
        if (place[i] >= 0) {
            expert_ids[place[i]] = lane + 32 * i - choice.first_expert;
            scores[place[i]] = score[i] * (choice.scaling / divisor);
        }
    if (choice.shared && lane == 0) {
        expert_ids[choice.choices] = experts - choice.first_expert;
        scores[choice.choices] = 1.f / (1.f + __expf(-shared_logit));
    }
}

// BY_LOGITS: choose_by_logits takes these arguments.
template <int PER_LANE, bool NORMALIZED, bool SIGMOID, bool BY_LOGITS, typename F>
DEVICE void choose(long long* expert_ids, float* scores, const Choice& choice, F logit) {
    if constexpr (BY_LOGITS) choose_by_logits<PER_LANE, NORMALIZED, SIGMOID>(expert_ids, scores, choice, logit);
    else choose_experts<PER_LANE, NORMALIZED, SIGMOID>(expert_ids, scores, choice, logit);
}
