// What a kernel does by instructions of PTX: matrix products of a warp, and copies in the background.
#pragma once

namespace cuemu {

struct Mma {
    float *d;
    const unsigned *a, *b;
};

// Fragments as the PTX ISA lays them out: lane = 4 group + member.
template <float (*TO_FLOAT)(unsigned short)> CUEMU_PLAIN void do_mma(void **lanes, unsigned mask) {
    if (mask != 0xffffffffu) fail("mma.sync needs all 32 lanes");
    float a[16][16], b[16][8], d[16][8];
    for (int l = 0; l < 32; l++) {
        Mma &m = *(Mma *)lanes[l];
        int group = l / 4, member = l % 4;
        for (int i = 0; i < 4; i++) {
            int row = group + (i & 1) * 8, column = member * 2 + (i >> 1) * 8;
            a[row][column] = TO_FLOAT((unsigned short)m.a[i]);
            a[row][column + 1] = TO_FLOAT((unsigned short)(m.a[i] >> 16));
            d[group + (i >> 1) * 8][member * 2 + (i & 1)] = m.d[i];
        }
        for (int i = 0; i < 2; i++) {
            int row = member * 2 + i * 8;
            b[row][group] = TO_FLOAT((unsigned short)m.b[i]);
            b[row + 1][group] = TO_FLOAT((unsigned short)(m.b[i] >> 16));
        }
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) ((Mma *)lanes[l])->d[i] = d[l / 4 + (i >> 1) * 8][l % 4 * 2 + (i & 1)];
}

inline float from_f16(unsigned short bits) { return __half2float({bits}); }
inline float from_bf16(unsigned short bits) { return __bfloat162float({bits}); }

struct Fragments {
    unsigned *to;
    const char *row;
};

// N matrices of 8 x 8; lane l gave the address of row l % 8 of matrix l / 8. Sanitizers see the reads.
template <int N, bool TRANSPOSED> void do_ldmatrix(void **lanes, unsigned mask) {
    if (mask != 0xffffffffu) fail("ldmatrix needs all 32 lanes");
    for (int i = 0; i < N; i++) {
        unsigned short matrix[8][8];
        for (int row = 0; row < 8; row++) {
            const char *from = ((Fragments *)lanes[i * 8 + row])->row;
            if ((size_t)from % 16) fail("a row of ldmatrix is not aligned to 16 bytes");
            CUEMU_READS(from, 16);
            memcpy(matrix[row], from, 16);
        }
        for (int l = 0; l < 32; l++) {
            int row = l / 4, column = l % 4 * 2;
            unsigned short low = TRANSPOSED ? matrix[column][row] : matrix[row][column];
            unsigned short high = TRANSPOSED ? matrix[column + 1][row] : matrix[row][column + 1];
            ((Fragments *)lanes[l])->to[i] = (unsigned)high << 16 | low;
        }
    }
}

// A copy happens no earlier than at the wait, so a wait that is missing or too lax reads NaN.
CUEMU_PLAIN inline void start_copy(void *to, const void *from, unsigned bytes) {
    Fiber &f = *engine.current;
    if ((size_t)to % bytes || (size_t)from % bytes) fail("a misaligned cp.async");
    if (f.copy_count == 64) fail("more than 64 cp.async of one thread are under way: a limit of cuemu");
    f.copies[f.copy_count++] = {to, from, bytes, f.copy_group};
}

CUEMU_PLAIN inline bool take_copy(int groups_left, Copy *copy) {
    Fiber &f = *engine.current;
    if (!f.copy_count || f.copies[0].group >= f.copy_group - groups_left) return false;
    *copy = f.copies[0];
    f.copy_count--;
    for (int i = 0; i < f.copy_count; i++) f.copies[i] = f.copies[i + 1];
    return true;
}

inline void cp_async(void *to, const void *from, unsigned bytes) {
    start_copy(to, from, bytes);
    CUEMU_WRITES(to, bytes);
    memset(to, 0xff, bytes);
}

inline void cp_async_wait(int groups_left) {
    for (Copy c; take_copy(groups_left, &c);) {
        CUEMU_READS(c.from, c.bytes);
        CUEMU_WRITES(c.to, c.bytes);
        memcpy(c.to, c.from, c.bytes);
    }
}

inline void mma(Site site, Operation operation, Mma data) { in_warp(0xffffffffu, &data, operation, site); }
inline void ldmatrix(Site site, Operation operation, Fragments data) { in_warp(0xffffffffu, &data, operation, site); }

} // namespace cuemu

// D (16 x 8, float) += A (16 x 16, rows) * B (16 x 8, columns).
#define cuemu_mma_bf16_16816(d, a, b)                                                                                  \
    cuemu::mma(CUEMU_SITE("mma.sync"), cuemu::do_mma<cuemu::from_bf16>, cuemu::Mma{d, a, b})
#define cuemu_mma_f16_16816(d, a, b)                                                                                   \
    cuemu::mma(CUEMU_SITE("mma.sync"), cuemu::do_mma<cuemu::from_f16>, cuemu::Mma{d, a, b})
#define CUEMU_LDMATRIX(n, transposed, r, p)                                                                            \
    cuemu::ldmatrix(CUEMU_SITE("ldmatrix"), cuemu::do_ldmatrix<n, transposed>, cuemu::Fragments{r, (const char *)(p)})
#define cuemu_ldmatrix_x4(r, p) CUEMU_LDMATRIX(4, false, r, p)
#define cuemu_ldmatrix_x2(r, p) CUEMU_LDMATRIX(2, false, r, p)
#define cuemu_ldmatrix_x4_trans(r, p) CUEMU_LDMATRIX(4, true, r, p)
#define cuemu_ldmatrix_x2_trans(r, p) CUEMU_LDMATRIX(2, true, r, p)
inline void cuemu_cp_async16(void *shared, const void *global) { cuemu::cp_async(shared, global, 16); }
CUEMU_PLAIN inline void cuemu_cp_async_commit() { cuemu::engine.current->copy_group++; }
template <int N> inline void cuemu_cp_async_wait() { cuemu::cp_async_wait(N); }
