// Barriers, shuffles and votes. Lanes that a mask names meet in one operation; the last to come does it for all.
#pragma once

namespace cuemu {

using Operation = void (*)(void **lanes, unsigned mask);

// Lanes beyond the end of a block whose size is not a multiple of 32 count as absent from a full mask.
CUEMU_PLAIN inline unsigned present(unsigned mask, unsigned first) {
    unsigned lanes = engine.threads - first;
    if (lanes >= 32) return mask;
    unsigned existing = (1u << lanes) - 1;
    if (mask != 0xffffffffu && mask & ~existing) fail("a warp mask names a lane that does not exist");
    return mask & existing;
}

// Whether lane l, if it is named, has yet to come to the operation that `me` came to.
CUEMU_PLAIN inline bool missing(const Fiber &me, const Fiber *warp, unsigned named, unsigned l) {
    const Fiber &other = warp[l];
    bool here = other.state == AT_WARP && other.mask == me.mask && other.operation == me.operation;
    return (named >> l & 1) && &other != &me && !here;
}

CUEMU_PLAIN inline bool all_came(const Fiber &me, const Fiber *warp, unsigned named) {
    // Neighbours first: in most orders one of them has not run yet.
    unsigned lane = me.flat % 32;
    if (missing(me, warp, named, (lane + 1) % 32) || missing(me, warp, named, (lane + 31) % 32)) return false;
    for (unsigned l = 0; l < 32; l++)
        if (missing(me, warp, named, l)) return false;
    return true;
}

CUEMU_PLAIN inline void in_warp(unsigned mask, void *data, Operation operation, Site site) {
    Engine &e = engine;
    Fiber *me = e.current;
    unsigned lane = me->flat % 32, first = me->flat - lane, named = present(mask, first);
    Fiber *warp = &e.fibers[first];
    me->site = site, me->mask = mask, me->data = data, me->operation = (const void *)operation;
    if (!(mask >> lane & 1)) fail("a lane is not in the mask that it gave");
    CUEMU_RELEASE(&e.post_tag[me->flat]);
    if (!all_came(*me, warp, named)) {
        me->state = AT_WARP;
        to_scheduler(me, false);
    } else {
        void *lanes[32] = {};
        for (unsigned l = 0; l < 32; l++) {
            if (!(named >> l & 1)) continue;
            CUEMU_ACQUIRE(&e.post_tag[first + l]);
            lanes[l] = warp[l].data;
        }
        if (operation) operation(lanes, named);
        for (unsigned l = 0; l < 32; l++) {
            if (!(named >> l & 1)) continue;
            CUEMU_RELEASE(&e.go_tag[first + l]);
            warp[l].state = READY;
        }
    }
    CUEMU_ACQUIRE(&e.go_tag[me->flat]);
}

CUEMU_PLAIN inline int lane() { return engine.current->flat % 32; }

template <class T> struct Shuffled {
    T value, result;
    int source;
};

template <class T> CUEMU_PLAIN void do_shuffle(void **lanes, unsigned mask) {
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        auto *to = (Shuffled<T> *)lanes[l];
        if (!(mask >> to->source & 1)) fail("a shuffle reads a lane outside its mask");
        to->result = ((Shuffled<T> *)lanes[to->source])->value;
    }
}

template <class T> CUEMU_PLAIN T shuffle_from(unsigned mask, T value, int source, Site site) {
    Shuffled<T> data{value, value, source};
    in_warp(mask, &data, do_shuffle<T>, site);
    return data.result;
}

template <class T> T shuffle_index(Site site, unsigned mask, T value, int index, int width = 32) {
    return shuffle_from(mask, value, lane() / width * width + (index & (width - 1)), site);
}
template <class T> T shuffle_up(Site site, unsigned mask, T value, unsigned delta, int width = 32) {
    bool inside = lane() % width >= (int)delta;
    return shuffle_from(mask, value, inside ? lane() - (int)delta : lane(), site);
}
template <class T> T shuffle_down(Site site, unsigned mask, T value, unsigned delta, int width = 32) {
    bool inside = lane() % width + (int)delta < width;
    return shuffle_from(mask, value, inside ? lane() + (int)delta : lane(), site);
}
template <class T> T shuffle_xor(Site site, unsigned mask, T value, int bits, int width = 32) {
    int source = lane() ^ bits;
    return shuffle_from(mask, value, source / width <= lane() / width ? source : lane(), site);
}

struct Vote {
    bool predicate;
    unsigned ballot;
};

CUEMU_PLAIN inline void do_vote(void **lanes, unsigned mask) {
    unsigned ballot = 0;
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1 && ((Vote *)lanes[l])->predicate) ballot |= 1u << l;
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) ((Vote *)lanes[l])->ballot = ballot;
}

CUEMU_PLAIN inline unsigned vote(Site site, unsigned mask, bool predicate) {
    Vote data{predicate, 0};
    in_warp(mask, &data, do_vote, site);
    return data.ballot;
}

CUEMU_PLAIN inline void warp_barrier(Site site, unsigned mask = 0xffffffffu) {
    in_warp(mask, nullptr, nullptr, site);
}

// Lanes that have not exited: more than hardware may have converged, which a kernel must not rely on anyway.
CUEMU_PLAIN inline unsigned active() {
    unsigned first = engine.current->flat / 32 * 32, mask = 0;
    for (unsigned l = 0; l < 32 && first + l < engine.threads; l++)
        if (engine.fibers[first + l].state != EXITED) mask |= 1u << l;
    return mask;
}

} // namespace cuemu

#define __syncthreads() ((void)cuemu::barrier(CUEMU_SITE("__syncthreads"), false))
#define __syncthreads_count(p) ((int)cuemu::barrier(CUEMU_SITE("__syncthreads_count"), (p) != 0))
#define __syncthreads_or(p) (cuemu::barrier(CUEMU_SITE("__syncthreads_or"), (p) != 0) != 0)
#define __syncthreads_and(p) (cuemu::barrier(CUEMU_SITE("__syncthreads_and"), (p) == 0) == 0)
#define __shfl_sync(...) cuemu::shuffle_index(CUEMU_SITE("__shfl_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) cuemu::shuffle_up(CUEMU_SITE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) cuemu::shuffle_down(CUEMU_SITE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) cuemu::shuffle_xor(CUEMU_SITE("__shfl_xor_sync"), __VA_ARGS__)
#define __ballot_sync(mask, p) cuemu::vote(CUEMU_SITE("__ballot_sync"), mask, (p) != 0)
#define __any_sync(mask, p) ((int)(cuemu::vote(CUEMU_SITE("__any_sync"), mask, (p) != 0) != 0))
#define __all_sync(mask, p) ((int)(cuemu::vote(CUEMU_SITE("__all_sync"), mask, (p) == 0) == 0))
#define __syncwarp(...) cuemu::warp_barrier(CUEMU_SITE("__syncwarp") __VA_OPT__(, ) __VA_ARGS__)
#define __activemask() cuemu::active()

inline void __threadfence() {}
inline void __threadfence_block() {}
inline long long clock64() { return (long long)cuemu::engine.switches; }
