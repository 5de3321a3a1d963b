// Convolutions of 3 x 3 x 3 or 1 x 3 x 3 voxels, padded to keep the size, by Winograd's F(4 x 4, 3 x 3) along H and W.
// An image is a volume of one slice. convolutions.py says what for, and checks what comes in here.
//
// Features are float32 in the order [n][d][h][w][c], c a multiple of 16. A tile is 4 x 4 outputs of one slice, which
// see 6 x 6 inputs; each of its 36 points after the transform is called p. The kernel's side along D is kd, 3 or 1. A
// column is the tiles above each other along D; columns are worked on in chunks that stay in the caches:
//
//     v [p][column][d + kd - 1][ci]    transformed inputs; with kd 3, the slices before and after the volume are zero
//     m [p][column][d][co]             transformed outputs, or gradients of outputs
//     u [p][co / 16][kd ci][16]        transformed kernels; their gradient is [p][kd ci, to a multiple of 6][co]
//
// In v the kd slices that one output sees lie one after the other, so that for each p all of the convolution is one
// matrix product, of kd ci terms. No sum depends on the number of threads.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_num_threads() 1
#define omp_get_thread_num() 0
#endif

typedef int64_t Int;
typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));
enum { WIDTH = 8, PANEL = 16, ROWS = 6, POINTS = 36 };
enum { TILES = 48, FLOATS = 1 << 18 };  // a chunk has about so many tiles where a thread has its own, or floats of v

#define LOAD(p) (*(const Vector *)(p))
#define STORE(p, x) (*(Vector *)(p) = (x))
#define ADD(p, x) STORE(p, LOAD(p) + (x))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef struct {
  Int n, d, h, w, ci, co, threads, kd;
  Int deep, terms, u_step;  // slices of a column of v, terms of a product, from one p to the next in u
  Int tiles_h, tiles_w, columns, chunk;  // chunk: columns at a time
  Int v_step, m_step;  // from one p to the next; 16 more than needed, as caches map powers of two onto few lines
  float *u, *v, *m;
} Job;

static Job job_of(const Int *sizes) {
  Job j = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
  j.deep = j.d + j.kd - 1;
  j.terms = j.kd * j.ci;
  j.u_step = (j.terms + ROWS - 1) / ROWS * ROWS * j.co;
  j.tiles_h = (j.h + 3) / 4;
  j.tiles_w = (j.w + 3) / 4;
  j.columns = j.n * j.tiles_h * j.tiles_w;
  return j;
}

// Room for u and for so many chunks in v and m; 0 where there is none.
static int allocate(Job *j, Int chunk, Int chunks) {
  j->chunk = chunk;
  j->v_step = chunk * j->deep * j->ci + 16;
  j->m_step = (chunk * j->d + ROWS) * j->co + 16;
  j->u = malloc(sizeof(float) * POINTS * (j->u_step + chunks * (j->v_step + j->m_step)));
  j->v = j->u + POINTS * j->u_step;
  j->m = j->v + POINTS * chunks * j->v_step;
  return j->u != NULL;
}

// ------------------------------------------------------------------------------------------------------- transforms
// Along one axis, to values `step` apart; the points are 0, 1, -1, 2, -2 and infinity. The names of the matrices are
// those of the paper.

// B^T: six inputs
#define INPUT(o, step, i0, i1, i2, i3, i4, i5) { \
  Vector a = i4 - 4 * i2, b = i3 - 4 * i1, c = i4 - i2, e = 2 * (i3 - i1); \
  o[0] = 4 * i0 - 5 * i2 + i4; o[step] = a + b; o[2 * step] = a - b; \
  o[3 * step] = c + e; o[4 * step] = c - e; o[5 * step] = 4 * i1 - 5 * i3 + i5; }

// A^T: six products to four outputs
#define OUTPUT(o, step, i0, i1, i2, i3, i4, i5) { \
  Vector a = i1 + i2, b = i1 - i2, c = i3 + i4, e = i3 - i4; \
  o[0] = i0 + a + c; o[step] = b + 2 * e; o[2 * step] = a + 4 * c; o[3 * step] = b + 8 * e + i5; }

// A: four gradients of outputs
#define GRADIENT(o, step, i0, i1, i2, i3) { \
  Vector a = i0 + i2, b = i1 + i3, c = i0 + 4 * i2, e = 2 * i1 + 8 * i3; \
  o[0] = i0; o[step] = a + b; o[2 * step] = a - b; o[3 * step] = c + e; o[4 * step] = c - e; o[5 * step] = i3; }

// G: three weights
#define KERNEL(o, step, i0, i1, i2) { \
  Vector a = (i0 + i2) * (-1.f / 6), b = i1 * (1.f / 6), c = i0 * (1.f / 24) + i2 * (1.f / 6), e = i1 * (1.f / 12); \
  o[0] = i0 * .25f; o[step] = a - b; o[2 * step] = a + b; o[3 * step] = c + e; o[4 * step] = c - e; o[5 * step] = i2; }

// G^T: six products to the gradients of three weights
#define KERNEL_GRADIENT(o, step, i0, i1, i2, i3, i4, i5) { \
  Vector a = (i1 + i2) * (-1.f / 6), b = (i2 - i1) * (1.f / 6), c = i3 + i4, e = i3 - i4; \
  o[0] = i0 * .25f + a + c * (1.f / 24); o[step] = b + e * (1.f / 12); o[2 * step] = a + c * (1.f / 6) + i5; }

// Where a tile lies: in slice `row % d` of column `first + row / d`.
typedef struct { Int column, slice, n, h, w; } Tile;

static Tile tile(const Job *j, Int first, Int row) {
  Tile t = {row / j->d, row % j->d};
  Int place = (first + t.column) % (j->tiles_h * j->tiles_w);
  t.n = (first + t.column) / (j->tiles_h * j->tiles_w);
  t.h = place / j->tiles_w * 4;
  t.w = place % j->tiles_w * 4;
  return t;
}

static void transform_input(const Job *j, const float *x, Int first, Int row) {
  const Tile t = tile(j, first, row);
  const float *from = x + (t.n * j->d + t.slice) * j->h * j->w * j->ci;
  float *to = j->v + (t.column * j->deep + t.slice + j->kd / 2) * j->ci;
  for (Int c = 0; c < j->ci; c += WIDTH) {
    Vector in[6], half[36], out[6];
    for (Int y = 0; y < 6; y++) {
      for (Int x = 0; x < 6; x++) {
        const Int h = t.h + y - 1, w = t.w + x - 1;
        const int inside = h >= 0 && h < j->h && w >= 0 && w < j->w;
        in[x] = inside ? LOAD(from + (h * j->w + w) * j->ci + c) : (Vector){0};
      }
      INPUT((half + 6 * y), 1, in[0], in[1], in[2], in[3], in[4], in[5])
    }
    for (Int x = 0; x < 6; x++) {
      INPUT(out, 1, half[x], half[6 + x], half[12 + x], half[18 + x], half[24 + x], half[30 + x])
      for (Int y = 0; y < 6; y++) STORE(to + (6 * y + x) * j->v_step + c, out[y]);
    }
  }
}

static void transform_gradient(const Job *j, const float *dy, Int first, Int row) {
  const Tile t = tile(j, first, row);
  const float *from = dy + (t.n * j->d + t.slice) * j->h * j->w * j->co;
  float *to = j->m + row * j->co;
  for (Int c = 0; c < j->co; c += WIDTH) {
    Vector in[4], half[24], out[6];
    for (Int y = 0; y < 4; y++) {
      for (Int x = 0; x < 4; x++) {
        const Int h = t.h + y, w = t.w + x;
        in[x] = h < j->h && w < j->w ? LOAD(from + (h * j->w + w) * j->co + c) : (Vector){0};
      }
      GRADIENT((half + 6 * y), 1, in[0], in[1], in[2], in[3])
    }
    for (Int x = 0; x < 6; x++) {
      GRADIENT(out, 1, half[x], half[6 + x], half[12 + x], half[18 + x])
      for (Int y = 0; y < 6; y++) STORE(to + (6 * y + x) * j->m_step + c, out[y]);
    }
  }
}

static void transform_output(const Job *j, const float *bias, float *y, Int first, Int row) {
  const Tile t = tile(j, first, row);
  const float *from = j->m + row * j->co;
  float *to = y + (t.n * j->d + t.slice) * j->h * j->w * j->co;
  for (Int c = 0; c < j->co; c += WIDTH) {
    Vector in[6], half[24], out[4], shift = bias ? LOAD(bias + c) : (Vector){0};
    for (Int x = 0; x < 6; x++) {
      for (Int y = 0; y < 6; y++) in[y] = LOAD(from + (6 * y + x) * j->m_step + c);
      OUTPUT((half + x), 6, in[0], in[1], in[2], in[3], in[4], in[5])
    }
    for (Int y = 0; y < 4 && t.h + y < j->h; y++) {
      const Vector *r = half + 6 * y;
      OUTPUT(out, 1, r[0], r[1], r[2], r[3], r[4], r[5])
      float *line = to + ((t.h + y) * j->w + t.w) * j->co + c;
      for (Int x = 0; x < 4 && t.w + x < j->w; x++) STORE(line + x * j->co, out[x] + shift);
    }
  }
}

// One kd and ci of w [kd][kh][kw][ci][co], which is turned about in space where `turned`.
static void transform_kernel(const Job *j, const float *w, int turned, Int kd, Int ci) {
  const Int weight = j->ci * j->co;
  for (Int co = 0; co < j->co; co += WIDTH) {
    const float *from = w + ((turned ? j->kd - 1 - kd : kd) * 9 * j->ci + ci) * j->co + co;
    float *to = j->u + ((co / PANEL * j->kd + kd) * j->ci + ci) * PANEL + co % PANEL;
    Vector in[9], half[18], out[6];
    for (Int k = 0; k < 9; k++) in[k] = LOAD(from + (turned ? 8 - k : k) * weight);
    for (Int x = 0; x < 3; x++) KERNEL((half + x), 3, in[x], in[3 + x], in[6 + x])
    for (Int y = 0; y < 6; y++) {
      const Vector *r = half + 3 * y;
      KERNEL(out, 1, r[0], r[1], r[2])
      for (Int x = 0; x < 6; x++) STORE(to + (6 * y + x) * j->u_step, out[x]);
    }
  }
}

static void transform_kernel_gradient(const Job *j, float *dw, Int kd, Int ci) {
  const Int weight = j->ci * j->co;
  for (Int co = 0; co < j->co; co += WIDTH) {
    const float *from = j->u + (kd * j->ci + ci) * j->co + co;
    float *to = dw + (kd * 9 * j->ci + ci) * j->co + co;
    Vector in[6], half[18], out[3];
    for (Int x = 0; x < 6; x++) {
      for (Int y = 0; y < 6; y++) in[y] = LOAD(from + (6 * y + x) * j->u_step);
      KERNEL_GRADIENT((half + x), 6, in[0], in[1], in[2], in[3], in[4], in[5])
    }
    for (Int y = 0; y < 3; y++) {
      const Vector *r = half + 6 * y;
      KERNEL_GRADIENT(out, 1, r[0], r[1], r[2], r[3], r[4], r[5])
      for (Int x = 0; x < 3; x++) STORE(to + (3 * y + x) * weight, out[x]);
    }
  }
}

// --------------------------------------------------------------------------------------------------- matrix products
// Six rows times two vectors: with twelve sums, two vectors and a factor in registers, nothing waits for memory.
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define BEGIN(r) Vector low##r = {0}, high##r = {0};

// out [6][co], 16 of co, from `terms` terms of each of six rows of v.
static void multiply_rows(const float *const rows[ROWS], const float *u, Int terms, float *out, Int co) {
#define ROW(r) const float *row##r = rows[r];
#define STEP(r) low##r += row##r[k] * low; high##r += row##r[k] * high;
#define END(r) STORE(out + r * co, low##r); STORE(out + r * co + WIDTH, high##r);
  EACH(BEGIN) EACH(ROW)
  for (Int k = 0; k < terms; k++) {
    const Vector low = LOAD(u + k * PANEL), high = LOAD(u + k * PANEL + WIDTH);
    EACH(STEP)
  }
  EACH(END)
}

// Add to out [6][co], 16 of co, the sum over all rows of six values of v times 16 of m.
static void multiply_columns(const Job *j, const float *v, const float *m, Int columns, float *out) {
#define STEP2(r) low##r += v[r] * low; high##r += v[r] * high;
#define END2(r) ADD(out + r * j->co, low##r); ADD(out + r * j->co + WIDTH, high##r);
  EACH(BEGIN)
  for (Int column = 0; column < columns; column++, v += (j->kd - 1) * j->ci)
    for (Int slice = 0; slice < j->d; slice++, v += j->ci, m += j->co) {
      const Vector low = LOAD(m), high = LOAD(m + WIDTH);
      EACH(STEP2)
    }
  EACH(END2)
}

static void clear_borders(const Job *j, Int i) {
  float *column = j->v + i / j->chunk * j->v_step + i % j->chunk * j->deep * j->ci;
  memset(column, 0, sizeof(float) * (j->kd / 2) * j->ci);
  memset(column + (j->deep - j->kd / 2) * j->ci, 0, sizeof(float) * (j->kd / 2) * j->ci);
}

// ------------------------------------------------------------------------------------------------------------- calls
// sizes: n, d, h, w, ci, co, threads, kd, turned. Both return 0 where there is not enough memory.

// Of a chunk what thread `t` of the `team` that shares it has to do.
static void convolve_chunk(const Job *j, const float *x, const float *bias, float *y, Int first, Int t, Int team) {
  const Int panels = j->co / PANEL, rows = MIN(j->chunk, j->columns - first) * j->d;
  for (Int row = t; row < rows; row += team) transform_input(j, x, first, row);
  if (team > 1) {
#pragma omp barrier
  }
  for (Int i = t; i < POINTS * panels; i += team) {
    const Int p = i / panels, panel = i % panels;
    for (Int row = 0; row < rows; row += ROWS) {
      const float *six[ROWS];
      for (Int r = 0; r < ROWS; r++) {  // beyond the last row it is calculated again, into rows nobody reads
        const Int this = MIN(row + r, rows - 1);
        six[r] = j->v + p * j->v_step + (this + this / j->d * (j->kd - 1)) * j->ci;
      }
      float *out = j->m + p * j->m_step + row * j->co + panel * PANEL;
      multiply_rows(six, j->u + p * j->u_step + panel * j->terms * PANEL, j->terms, out, j->co);
    }
  }
  if (team > 1) {
#pragma omp barrier
  }
  for (Int row = t; row < rows; row += team) transform_output(j, bias, y, first, row);
}

// y [n][d][h][w][co] = x [n][d][h][w][ci] convolved with w [kd][kh][kw][ci][co], plus bias [co] unless that is NULL;
// with w turned about in space where `turned`, for the gradient of an input
int winograd_convolve(const Int *sizes, const float *x, const float *w, const float *bias, float *y) {
  Job job = job_of(sizes), *j = &job;
  // Each thread has chunks of its own, and waits for no other. All share one where there are few tiles for each: they
  // would all read all of u, for little work.
  const int shared = j->columns * j->d < TILES / 2 * j->threads;
  if (!allocate(j, shared ? j->columns : MAX(1, TILES / j->d), shared ? 1 : j->threads)) return 0;
#pragma omp parallel num_threads(j->threads)
  {
    const Int team = omp_get_num_threads(), t = omp_get_thread_num();
    Job own = job;
#pragma omp for schedule(static)
    for (Int i = 0; i < j->terms; i++) transform_kernel(j, w, sizes[8], i / j->ci, i % j->ci);
    if (shared) {
#pragma omp for schedule(static)
      for (Int i = 0; i < POINTS * j->chunk; i++) clear_borders(j, i);
      convolve_chunk(j, x, bias, y, 0, t, team);
    } else {
      own.v += POINTS * t * j->v_step;
      own.m += POINTS * t * j->m_step;
      for (Int i = 0; i < POINTS * j->chunk; i++) clear_borders(&own, i);
      for (Int first = t * j->chunk; first < j->columns; first += team * j->chunk)
        convolve_chunk(&own, x, bias, y, first, 0, 1);
    }
  }
  free(j->u);
  return 1;
}

// dw [kd][kh][kw][ci][co], the gradient of w from x [n][d][h][w][ci] and dy [n][d][h][w][co]
int winograd_weight_gradient(const Int *sizes, const float *x, const float *dy, float *dw) {
  Job job = job_of(sizes), *j = &job;
  const Int panels = j->co / PANEL, most = FLOATS / (POINTS * j->deep * MAX(j->ci, j->co));
  const Int chunks = most ? (j->columns + most - 1) / most : j->columns;
  if (!allocate(j, (j->columns + chunks - 1) / chunks, 1)) return 0;
#pragma omp parallel num_threads(j->threads)
  {
#pragma omp for schedule(static)
    for (Int p = 0; p < POINTS; p++) memset(j->u + p * j->u_step, 0, sizeof(float) * j->u_step);
#pragma omp for schedule(static)
    for (Int i = 0; i < POINTS * j->chunk; i++) clear_borders(j, i);
    for (Int first = 0; first < j->columns; first += j->chunk) {
      const Int columns = MIN(j->chunk, j->columns - first);
#pragma omp for schedule(static)
      for (Int row = 0; row < columns * j->d; row++) {
        transform_input(j, x, first, row);
        transform_gradient(j, dy, first, row);
      }
#pragma omp for schedule(static)
      for (Int i = 0; i < POINTS * panels; i++) {
        const Int p = i / panels, panel = i % panels;
        for (Int k = 0; k < j->terms; k += ROWS)  // rows beyond the last term are sums of what nobody reads
          multiply_columns(j, j->v + p * j->v_step + k, j->m + p * j->m_step + panel * PANEL, columns,
                           j->u + p * j->u_step + k * j->co + panel * PANEL);
      }
    }
#pragma omp for schedule(static)
    for (Int i = 0; i < j->terms; i++) transform_kernel_gradient(j, dw, i / j->ci, i % j->ci);
  }
  free(j->u);
  return 1;
}
