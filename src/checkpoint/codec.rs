//! Numbers as bytes, little-endian, to f32 and back; rounding is to nearest, ties to even.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::gguf::decode_blocks;
use super::storage::Storage;
use crate::backend::DType;

/// Values of `bytes` as f32; `false` when they are not floating-point numbers. `bytes` holds `out.len()` values,
/// in whole blocks.
pub(super) fn decode(storage: Storage, bytes: &[u8], out: &mut [f32]) -> bool {
    match storage {
        Storage::F32 => each(bytes, out, f32::from_le_bytes),
        Storage::Bf16 => each(bytes, out, |value| bf16::from_le_bytes(value).to_f32()),
        Storage::F16 => decode_f16(bytes, out),
        Storage::F64 => each(bytes, out, |value| f64::from_le_bytes(value) as f32),
        _ => return decode_blocks(storage, bytes, out),
    }
    true
}

fn each<const SIZE: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; SIZE]) -> f32) {
    for (value, out) in bytes.as_chunks::<SIZE>().0.iter().zip(out) {
        *out = decode(*value);
    }
}

/// Through a block of aligned values: `half` converts a slice with the instructions of the machine.
fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    const BLOCK: usize = 512;
    let mut block = [f16::ZERO; BLOCK];
    for (bytes, out) in bytes.chunks(2 * BLOCK).zip(out.chunks_mut(BLOCK)) {
        let block = &mut block[..out.len()];
        for (value, bytes) in block.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *value = f16::from_le_bytes(*bytes);
        }
        block.convert_to_f32_slice(out);
    }
}

/// Why a value cannot be written.
#[derive(Debug)]
pub(super) struct TooLarge {
    /// Its place among the values.
    pub(super) index: usize,
}

/// Appends `values` to `out` as `dtype`, u32 as the whole number that the value is.
/// A finite value that would round to infinity is an error.
pub(super) fn encode(dtype: DType, values: &[f32], out: &mut Vec<u8>) -> Result<(), TooLarge> {
    match dtype {
        DType::F32 => append(values, out, |value| Some(value.to_le_bytes())),
        DType::F64 => append(values, out, |value| Some(f64::from(value).to_le_bytes())),
        DType::Bf16 => append(values, out, |value| {
            let rounded = bf16::from_f32(value);
            (rounded.is_finite() || !value.is_finite()).then(|| rounded.to_le_bytes())
        }),
        DType::F16 => append(values, out, |value| {
            let rounded = f16::from_f32(value);
            (rounded.is_finite() || !value.is_finite()).then(|| rounded.to_le_bytes())
        }),
        DType::U32 => append(values, out, |value| {
            let whole = value as u32;
            (whole as f32 == value && value < u32::MAX as f32).then(|| whole.to_le_bytes())
        }),
    }
}

fn append<const SIZE: usize>(
    values: &[f32],
    out: &mut Vec<u8>,
    encode: impl Fn(f32) -> Option<[u8; SIZE]>,
) -> Result<(), TooLarge> {
    out.reserve(SIZE * values.len());
    for (index, value) in values.iter().enumerate() {
        out.extend_from_slice(&encode(*value).ok_or(TooLarge { index })?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn through(dtype: DType, storage: Storage, values: &[f32]) -> Vec<f32> {
        let mut bytes = Vec::new();
        encode(dtype, values, &mut bytes).unwrap();
        let mut out = vec![f32::NAN; values.len()];
        assert!(decode(storage, &bytes, &mut out));
        out
    }

    #[test]
    fn a_tie_rounds_to_the_even_neighbour() {
        let one_and = |bits: i32| 1.0 + 2f32.powi(bits);
        // Between 1 and its successor, then between that and the next.
        let ties = [one_and(-8), one_and(-7) + 2f32.powi(-8), one_and(-11), one_and(-10) + 2f32.powi(-11)];
        assert_eq!(through(DType::Bf16, Storage::Bf16, &ties[..2]), [1.0, one_and(-6)]);
        assert_eq!(through(DType::F16, Storage::F16, &ties[2..]), [1.0, one_and(-9)]);
        let above = 1.0 + 2f32.powi(-8) + 2f32.powi(-20);
        assert_eq!(through(DType::Bf16, Storage::Bf16, &[above]), [one_and(-7)]);
    }

    #[test]
    fn a_finite_value_never_becomes_infinite() {
        for (dtype, largest, over) in [(DType::F16, 65504.0, 65520.0), (DType::Bf16, 3.38e38, f32::MAX)] {
            let mut bytes = Vec::new();
            encode(dtype, &[largest, f32::INFINITY, f32::NAN], &mut bytes).unwrap();
            assert_eq!(encode(dtype, &[0.0, over], &mut bytes).unwrap_err().index, 1);
        }
    }

    proptest! {
        #[test]
        fn what_a_dtype_can_hold_goes_through_unchanged(bits in prop::collection::vec(any::<u16>(), 1..1500)) {
            let finite_or = |value: f32| if value.is_nan() { 0.0 } else { value };
            let values: Vec<f32> = bits.iter().map(|bits| finite_or(bf16::from_bits(*bits).to_f32())).collect();
            for (dtype, storage) in [(DType::F32, Storage::F32), (DType::Bf16, Storage::Bf16), (DType::F64, Storage::F64)] {
                prop_assert_eq!(&through(dtype, storage, &values), &values);
            }
            let values: Vec<f32> = bits.iter().map(|bits| finite_or(f16::from_bits(*bits).to_f32())).collect();
            prop_assert_eq!(&through(DType::F16, Storage::F16, &values), &values);
        }

        #[test]
        fn rounding_goes_to_the_nearest(value in -60000f32..60000.0) {
            for (dtype, storage, digits) in [(DType::Bf16, Storage::Bf16, 8), (DType::F16, Storage::F16, 11)] {
                let rounded = through(dtype, storage, &[value])[0];
                let half_step = value.abs().max(2f32.powi(-14)) * 2f32.powi(-digits);
                prop_assert!((rounded - value).abs() <= half_step);
            }
        }
    }
}
