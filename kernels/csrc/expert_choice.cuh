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

// Write the `choices` experts of a token with the greatest scores, and their scores: sigmoid(logit), or the softmax of all logits.
// NORMALIZED divides them by their sum, which is at least least_sum. logit(i) is that of expert i; a lane has the experts lane,
// lane + 32, ... If logits are ROUNDED to 16 bits, their last bits are zeros, in which an expert's number finds room if there is no bias.
template <int PER_LANE, bool NORMALIZED, bool SIGMOID, bool ROUNDED, typename F>
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
    constexpr unsigned NUMBERS = 0x1fff;
    const bool numbered = ROUNDED && !choice.bias;
    unsigned order[PER_LANE];  // 0: chosen, or no expert
    int place[PER_LANE];       // among the choices, or -1
    UNROLL for (int i = 0; i < PER_LANE; ++i) {
        order[i] = lane + 32 * i < experts ? order_key(key[i]) : 0;
        if (numbered && order[i]) order[i] = (order[i] & ~NUMBERS) | (NUMBERS - lane - 32 * i);  // of equal experts the first has the greatest
        place[i] = -1;
    }
    sum = 0.f;
    for (int n = 0; n < choice.choices; ++n) {
        unsigned best = 0;
        UNROLL for (int i = 0; i < PER_LANE; ++i) best = max(best, order[i]);
        best = __reduce_max_sync(0xffffffffu, best);
        int expert = NUMBERS - (best & NUMBERS);
        if (!numbered) {
            int first = PER_LANE;  // of the lane's experts that are as good
            UNROLL for (int i = PER_LANE - 1; i >= 0; --i)
                if (order[i] == best) first = i;
            expert = __reduce_min_sync(0xffffffffu, lane + 32u * first);
        }
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
