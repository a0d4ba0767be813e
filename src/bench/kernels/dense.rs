//! Products, norm, embedding, gated activation, copies.

use super::{Bench, Work};
use crate::backend::ops::{
    Copy, Embed, EmbedBackward, Linear, LinearBackwardInput, LinearBackwardWeight, RmsNorm, RmsNormBackward, Swiglu,
    SwigluBackward,
};
use crate::backend::{DType, Out};
use crate::bench::Result;

/// The products of the shape, a square one, and those of a single row.
pub(super) fn products(bench: &mut Bench<'_>) -> Result<()> {
    let (tokens, hidden) = (bench.tokens, bench.config.hidden_size);
    let (mlp, vocabulary) = (bench.config.intermediate_size, bench.config.vocab_size);
    for sizes in [[1024; 3], [tokens, hidden, mlp], [tokens, mlp, hidden], [tokens, hidden, vocabulary]] {
        product(bench, sizes)?;
        bench.beside_gemm(sizes)?;
    }
    for sizes in [[1, hidden, mlp], [1, hidden, vocabulary]] {
        product(bench, sizes)?;
    }
    for sizes in [[tokens, hidden, mlp], [tokens, hidden, vocabulary]] {
        product_backward(bench, sizes)?;
    }
    Ok(())
}

/// A square product of as many rows as there are tokens, and a copy.
pub(super) fn rates(bench: &mut Bench<'_>, values: usize) -> Result<()> {
    product(bench, [bench.tokens; 3])?;
    let (device, source, target) = (bench.device, bench.values(1, values)?, bench.room(1, values)?);
    let op = Copy { src: source.view(), out: Out::assign(target.view()) };
    let bytes = 2 * values * bench.activations().size();
    bench.op(("copy", values.to_string()), Work { flops: 0.0, bytes }, || device.copy(&op))
}

fn words([m, k, n]: [usize; 3]) -> String {
    format!("{m}×{k}×{n}")
}

/// A product with a weight of `of_weight` bytes a value.
fn work(bench: &Bench<'_>, [m, k, n]: [usize; 3], of_weight: usize) -> Work {
    let bytes = (m * k + m * n) * bench.activations().size() + k * n * of_weight;
    Work { flops: 2.0 * m as f64 * k as f64 * n as f64, bytes }
}

fn product(bench: &mut Bench<'_>, sizes: [usize; 3]) -> Result<()> {
    let ([m, k, n], device) = (sizes, bench.device);
    let (x, weight, out) = (bench.values(m, k)?, bench.weight(n, k)?, bench.room(m, n)?);
    let op = Linear { x: x.view(), weight: weight.view, bias: None, out: Out::assign(out.view()) };
    let work = work(bench, sizes, bench.dtype.size());
    bench.op(("linear", words(sizes)), work, || device.linear(&op))
}

fn product_backward(bench: &mut Bench<'_>, sizes: [usize; 3]) -> Result<()> {
    let ([m, k, n], device) = (sizes, bench.device);
    let (x, weight, dout) = (bench.values(m, k)?, bench.weight(n, k)?, bench.values(m, n)?);
    let (dx, dweight) = (bench.room(m, k)?, bench.gradient(n, k)?);
    let op = LinearBackwardInput { dout: dout.view(), weight: weight.view, dx: Out::assign(dx.view()) };
    let (of_input, of_weight) = (work(bench, sizes, bench.dtype.size()), work(bench, sizes, DType::F32.size()));
    bench.op(("linear_backward_input", words(sizes)), of_input, || device.linear_backward_input(&op))?;
    let op = LinearBackwardWeight { x: x.view(), dout: dout.view(), dweight: dweight.view, dbias: None };
    bench.op(("linear_backward_weight", words(sizes)), of_weight, || device.linear_backward_weight(&op))
}

/// What goes row by row and is bound by memory.
pub(super) fn row(bench: &mut Bench<'_>) -> Result<()> {
    let (device, tokens, hidden) = (bench.device, bench.tokens, bench.config.hidden_size);
    let (mlp, vocabulary) = (bench.config.intermediate_size, bench.config.vocab_size);
    let (wide, inner) = (format!("{tokens}×{hidden}"), format!("{tokens}×{mlp}"));
    let size = bench.activations().size();
    let moved = |times: usize, width: usize| Work { flops: 0.0, bytes: times * tokens * width * size };

    let (x, dout, out) = (bench.values(tokens, hidden)?, bench.values(tokens, hidden)?, bench.room(tokens, hidden)?);
    let (weight, dweight, inv_rms) = (bench.numbers(1, hidden)?, bench.results(1, hidden)?, bench.results(1, tokens)?);
    let (x, dout, out, inv_rms) = (x.view(), dout.view(), out.view(), inv_rms.view());
    let op = RmsNorm { x, weight: weight.view(), eps: 1e-5, out, inv_rms: Some(inv_rms) };
    bench.op(("rms_norm", wide.clone()), moved(2, hidden), || device.rms_norm(&op))?;
    let dweight = Some(dweight.view());
    let op = RmsNormBackward { x, weight: weight.view(), inv_rms, dout, dx: Out::assign(out), dweight };
    bench.op(("rms_norm_backward", wide.clone()), moved(3, hidden), || device.rms_norm_backward(&op))?;
    let op = Copy { src: x, out: Out::add(out) };
    bench.op(("copy, added", wide.clone()), moved(3, hidden), || device.copy(&op))?;

    let (ids, table) = (bench.ids(vocabulary)?, bench.weight(vocabulary, hidden)?);
    let op = Embed { ids: ids.view(), weight: table.view, out };
    bench.op(("embed", wide.clone()), moved(2, hidden), || device.embed(&op))?;
    let gradient = bench.gradient(vocabulary, hidden)?;
    let op = EmbedBackward { ids: ids.view(), dout, dweight: gradient.view };
    bench.op(("embed_backward", wide), moved(3, hidden), || device.embed_backward(&op))?;

    let [gate, up, dout] = [bench.values(tokens, mlp)?, bench.values(tokens, mlp)?, bench.values(tokens, mlp)?];
    let [out, dup] = [bench.room(tokens, mlp)?, bench.room(tokens, mlp)?];
    let (gate, up, out, dup) = (gate.view(), up.view(), out.view(), dup.view());
    let op = Swiglu { gate, up, out };
    bench.op(("swiglu", inner.clone()), moved(3, mlp), || device.swiglu(&op))?;
    let op = SwigluBackward { gate, up, dout: dout.view(), dgate: out, dup };
    bench.op(("swiglu_backward", inner), moved(5, mlp), || device.swiglu_backward(&op))
}
