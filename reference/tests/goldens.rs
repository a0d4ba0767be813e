//! The scan, attention and the KLs against `tests/goldens`, whose numbers come from an independent evaluation in f64.
//!
//! A value's tolerance is the greater of 20 times its manifest difference and 2e-6 of its tensor's largest value. It holds for
//! this crate in f32 as in f64.

use std::collections::HashMap;
use std::path::PathBuf;

use h1_reference::*;
use ndarray::{Array, Array1, Array2, Array3, ArrayD, ArrayViewD, Dimension, Ix1, Ix2};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path(name)).unwrap()).unwrap()
}

/// One golden file: its tensors as f64, and how far off each may be.
struct Goldens {
    tensors: HashMap<String, ArrayD<f64>>,
    tolerances: HashMap<String, f64>,
    cases: Value,
}

impl Goldens {
    fn read(name: &str) -> Self {
        let file = format!("{name}.safetensors");
        let bytes = std::fs::read(path(&file)).unwrap();
        let tensor = |(name, view): (&str, safetensors::tensor::TensorView)| {
            let values = match view.dtype() {
                Dtype::F32 => view
                    .data()
                    .chunks_exact(4)
                    .map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap())))
                    .collect(),
                Dtype::U8 => view.data().iter().copied().map(f64::from).collect(),
                other => panic!("{name}: {other:?}"),
            };
            (name.to_owned(), ArrayD::from_shape_vec(view.shape(), values).unwrap())
        };
        let tensors = SafeTensors::deserialize(&bytes).unwrap().iter().map(tensor).collect();
        let tolerance = |entry: &Value| {
            let number = |key: &str| entry[key].as_f64().unwrap();
            let tolerance = f64::max(20.0 * number("max_abs_diff"), 2e-6 * number("max_abs_value"));
            (entry["tensor"].as_str().unwrap().to_owned(), tolerance)
        };
        let manifest = json("MANIFEST.json");
        let entries = manifest["tolerances"].as_array().unwrap();
        let tolerances = entries.iter().filter(|entry| entry["file"] == file.as_str()).map(tolerance).collect();
        Self { tensors, tolerances, cases: json(&format!("{name}.json")) }
    }

    fn cases(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.cases.as_object().unwrap().iter()
    }

    fn find(&self, name: &str) -> Option<ArrayViewD<'_, f64>> {
        self.tensors.get(name).map(|tensor| tensor.view())
    }

    fn get(&self, name: &str) -> ArrayViewD<'_, f64> {
        self.find(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Holds `got`, in the shape of `want` or with the same values in order, to the golden of this name.
    fn hold<T: Real, D: Dimension>(&self, name: &str, got: &Array<T, D>, want: ArrayViewD<f64>) {
        let tolerance = self.tolerances.get(name).unwrap_or_else(|| panic!("no tolerance of {name}"));
        assert_eq!(got.len(), want.len(), "{name}");
        for (&got, &want) in got.iter().zip(&want) {
            let error = (got.to_f64().unwrap() - want).abs();
            assert!(error <= *tolerance, "{name}: {got} for {want}, off by {error:e} of {tolerance:e}");
        }
    }
}

fn cast<T: Real, D: Dimension>(x: ArrayViewD<f64>) -> Array<T, D> {
    x.mapv(T::of).into_dimensionality().unwrap()
}

/// (batch, dim, length) → [batch * length, dim].
fn rows<T: Real>(x: ArrayViewD<f64>) -> Array2<T> {
    let x = x.permuted_axes(vec![0, 2, 1]);
    let shape = (x.shape()[0] * x.shape()[1], x.shape()[2]);
    cast(x.as_standard_layout().into_shape_with_order(shape).unwrap().view().into_dyn())
}

/// (batch, groups, state, length) → [batch * length, groups * state].
fn group_rows<T: Real>(x: ArrayViewD<f64>) -> Array2<T> {
    let shape = (x.shape()[0], x.shape()[1] * x.shape()[2], x.shape()[3]);
    rows(x.into_shape_with_order(shape).unwrap().into_dyn())
}

/// (batch, heads, length, dim) → [batch * length, heads * dim].
fn head_rows<T: Real>(x: ArrayViewD<f64>) -> Array2<T> {
    let x = x.permuted_axes(vec![0, 2, 1, 3]);
    let shape = (x.shape()[0] * x.shape()[1], x.shape()[2] * x.shape()[3]);
    cast(x.as_standard_layout().into_shape_with_order(shape).unwrap().view().into_dyn())
}

/// Segments of the given lengths end to end, each with the same past.
fn segments(lengths: impl IntoIterator<Item = usize>, past: usize) -> Vec<Segment> {
    let mut start = 0;
    let place = |len| {
        let segment = Segment { start, len, past };
        start += len;
        segment
    };
    lengths.into_iter().map(place).collect()
}

fn size(case: &Value, key: &str) -> usize {
    case[key].as_u64().unwrap_or_else(|| panic!("no size {key}")) as usize
}

fn sizes(value: &Value) -> Option<Vec<usize>> {
    value.as_array().map(|values| values.iter().map(|value| value.as_u64().unwrap() as usize).collect())
}

fn scan<T: Real>() {
    let goldens = Goldens::read("scan");
    for (name, case) in goldens.cases() {
        let key = |tensor: &str| format!("{name}.{tensor}");
        let get = |tensor: &str| goldens.get(&key(tensor));
        let find = |tensor: &str| goldens.find(&key(tensor));
        let length = size(case, "length");
        let segments = match sizes(&case["restarts"]) {
            Some(starts) => {
                let ends = starts.iter().skip(1).copied().chain([length]);
                segments(starts.iter().zip(ends).map(|(start, end)| end - start), 0)
            }
            None => segments(vec![length; size(case, "batch")], 0),
        };
        let (u, delta, a) = (rows::<T>(get("u")), rows::<T>(get("delta")), cast::<T, Ix2>(get("A")));
        let (b, c) = (group_rows::<T>(get("B")), group_rows::<T>(get("C")));
        let (d, delta_bias) = (find("D").map(cast::<T, Ix1>), find("delta_bias").map(cast::<T, Ix1>));
        let (z, state_in): (_, Option<Array3<T>>) = (find("z").map(rows::<T>), find("h0").map(cast));
        let (dy, dstate_out): (_, Option<Array3<T>>) = (rows::<T>(get("dy")), find("dlast_state").map(cast));
        let inputs = ScanInputs {
            u: u.view(),
            delta: delta.view(),
            a: a.view(),
            b: b.view(),
            c: c.view(),
            d: d.as_ref().map(|d| d.view()),
            z: z.as_ref().map(|z| z.view()),
            delta_bias: delta_bias.as_ref().map(|bias| bias.view()),
            softplus: case["delta_softplus"].as_bool().unwrap(),
            state_in: state_in.as_ref().map(|state| state.view()),
        };
        let hold_rows = |tensor: &str, got: &Array2<T>| {
            goldens.hold(&key(tensor), got, rows::<f64>(get(tensor)).view().into_dyn());
        };
        let hold_groups = |tensor: &str, got: &Array2<T>| {
            goldens.hold(&key(tensor), got, group_rows::<f64>(get(tensor)).view().into_dyn());
        };
        let (y, state_out) = selective_scan(&inputs, &segments);
        hold_rows("y", &y);
        // Of a row that restarts, the golden has the last segment's state.
        let batch = size(case, "batch");
        let last = state_out.slice(ndarray::s![state_out.dim().0 - batch.., .., ..]).to_owned();
        goldens.hold(&key("last_state"), &last, get("last_state"));

        let dstate = dstate_out.as_ref().map(|dstate| dstate.view());
        let gradients = selective_scan_backward(&inputs, &segments, dy.view(), dstate);
        hold_rows("grad.u", &gradients.du);
        hold_rows("grad.delta", &gradients.ddelta);
        goldens.hold(&key("grad.A"), &gradients.da, get("grad.A"));
        hold_groups("grad.B", &gradients.db);
        hold_groups("grad.C", &gradients.dc);
        if let Some(dd) = &gradients.dd {
            goldens.hold(&key("grad.D"), dd, get("grad.D"));
        }
        if let Some(dz) = &gradients.dz {
            hold_rows("grad.z", dz);
        }
        if let Some(dbias) = &gradients.ddelta_bias {
            goldens.hold(&key("grad.delta_bias"), dbias, get("grad.delta_bias"));
        }
        if state_in.is_some() {
            goldens.hold(&key("grad.h0"), &gradients.dstate_in, get("grad.h0"));
        }
    }
}

fn gqa<T: Real>() {
    let goldens = Goldens::read("attention");
    for (name, case) in goldens.cases() {
        let key = |tensor: &str| format!("{name}.{tensor}");
        let (q_len, kv_len) = (size(case, "q_len"), size(case, "kv_len"));
        let segments = match sizes(&case["documents"]) {
            Some(lengths) => segments(lengths, 0),
            None => segments(vec![q_len; size(case, "batch")], kv_len - q_len),
        };
        let op = Attention {
            head_dim: size(case, "head_dim"),
            window: case["sliding_window"].as_u64().map(|window| window as usize),
            scale: case["scale"].as_f64().unwrap(),
        };
        let get = |tensor: &str| head_rows::<T>(goldens.get(&key(tensor)));
        let hold = |tensor: &str, got: &Array2<T>| {
            goldens.hold(&key(tensor), got, head_rows::<f64>(goldens.get(&key(tensor))).view().into_dyn());
        };
        let (q, k, v, dout) = (get("q"), get("k"), get("v"), get("dout"));
        let (out, lse) = attention(q.view(), k.view(), v.view(), &segments, &op);
        hold("out", &out);
        let (dq, dk, dv) =
            attention_backward(q.view(), k.view(), v.view(), out.view(), lse.view(), dout.view(), &segments, &op);
        hold("grad.q", &dq);
        hold("grad.k", &dk);
        hold("grad.v", &dv);
    }
}

fn kl<T: Real>() {
    let goldens = Goldens::read("kl");
    for (name, case) in goldens.cases() {
        let vocab = size(case, "vocab");
        let number = |key: &str| case[key].as_f64().unwrap();
        let logits = |tensor: &str| -> Array2<T> {
            let x = goldens.get(&format!("{name}.{tensor}"));
            let rows = x.len() / vocab;
            cast(x.into_shape_with_order((rows, vocab)).unwrap().into_dyn())
        };
        let (student, teacher) = (logits("student_logits"), logits("teacher_logits"));
        let mask = goldens.get(&format!("{name}.mask"));
        let row_weights: Vec<T> = mask.iter().map(|&on| T::of(on / number("unmasked"))).collect();
        let labels = vec![None; row_weights.len()];
        for (spelling, mode) in [(Temperature::Both, "both"), (Temperature::TeacherOnly, "teacher_only")] {
            for direction in ["reverse", "forward"] {
                let (reverse_kl, forward_kl) = if direction == "reverse" { (1.0, 0.0) } else { (0.0, 1.0) };
                let op = HeadLoss {
                    weights: LossWeights { reverse_kl, forward_kl, cross_entropy: 0.0 },
                    logits_scale: number("logits_scale"),
                    temperature: number("temperature"),
                    spelling,
                    vocab_start: 0,
                };
                let hold = |tensor: &str, got: ArrayD<T>| {
                    let tensor = format!("{name}.{direction}.{mode}.{tensor}");
                    goldens.hold(&tensor, &got, goldens.get(&tensor));
                };
                let statistics = head_loss_statistics(student.view(), Some(teacher.view()), &labels, &op);
                let of_row = |row: &RowStatistics<T>| {
                    let losses = row.losses(false);
                    if direction == "reverse" { losses.reverse_kl } else { losses.forward_kl }
                };
                let per_token: Array1<T> = statistics.iter().map(of_row).collect();
                let loss = per_token.iter().zip(&row_weights).map(|(&loss, &weight)| loss * weight).sum::<T>();
                hold("per_token", per_token.into_dyn());
                hold("loss", Array1::from_elem(1, loss).into_dyn());
                let mut gradient = student.clone();
                let teacher = Some(teacher.view());
                head_loss_gradient(gradient.view_mut(), teacher, &labels, &statistics, &row_weights, &op);
                hold("grad", gradient.into_dyn());
            }
        }
    }
}

#[test]
fn scan_and_its_gradients_agree_with_the_goldens() {
    scan::<f32>();
    scan::<f64>();
}

#[test]
fn attention_and_its_gradients_agree_with_the_goldens() {
    gqa::<f32>();
    gqa::<f64>();
}

#[test]
fn divergences_and_their_gradients_agree_with_the_goldens() {
    kl::<f32>();
    kl::<f64>();
}
