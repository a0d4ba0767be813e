// What the shaders of products begin with, after the prelude: the sizes, and how a value of C is stored.
//
//   linear:                 out = x·weightᵀ       A = x,      Bᵀ = weight
//   linear_backward_input:  dx = dout·weight      A = dout,   B = weight
//   linear_backward_weight: dweight += doutᵀ·x    Aᵀ = dout,  B = x
//
// C = A·B or C += A·B, with C [m, n], A [m, k] or given as its transpose [k, m], and B [k, n] or given as its transpose
// [n, k]; with a bias [1, n] if there is one. Where C has fewer tiles than a GPU has room for, k is cut into splits of `span`,
// a workgroup's z each: C is then [splits·m, n], sums that `add_splits` adds up in their order.

override A_TRANSPOSED: bool = false;
override B_TRANSPOSED: bool = false;
override ADD: bool = false;
override BIAS: bool = false;

struct Parameters {
    a: vec2<u32>,
    b: vec2<u32>,
    bias: vec2<u32>,
    c: vec2<u32>,
    m: u32,
    n: u32,
    k: u32,
    /// Values of k that a workgroup sums.
    span: u32,
}

@group(0) @binding(2) var<storage, read> bias: array<Bias>; // [1, n]
@group(0) @binding(3) var<storage, read_write> c: array<Out>; // [m, n]
@group(1) @binding(0) var<uniform> p: Parameters;

fn store(split: u32, row: u32, col: u32, value: f32) {
    if row < p.m && col < p.n {
        let to = at(p.c, split * p.m + row, col);
        var sum = value;
        if BIAS {
            sum += f32(bias[p.bias.x + col]);
        }
        if ADD {
            sum += f32(c[to]);
        }
        c[to] = Out(sum);
    }
}
