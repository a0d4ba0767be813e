//! The weights of a new model.

use std::f64::consts::TAU;

use rand::RngExt;

use super::error::Result;
use crate::backend::{DType, Device};
use crate::model::Model;
use crate::model::config::ModelConfig;
use crate::model::tensors::Role;
use crate::random;

/// A new attention model: norms are 1, everything else is drawn from normal(0, `initializer_range`), each tensor from a
/// stream of its own name.
///
/// # Errors
/// When the device has no room.
pub fn fresh(device: &Device, config: ModelConfig, dtype: DType, seed: u64) -> Result<Model> {
    let model = Model::new(device, config, dtype)?;
    let deviation = model.config().initializer_range;
    for (id, parameter) in model.weights().table().iter() {
        let spec = &parameter.spec;
        let values = match spec.role {
            Role::Vector => vec![1.0; spec.len()],
            _ => normal(seed, &format!("weights of {}", spec.name), spec.len(), deviation),
        };
        model.weights().write(device, id, &values)?;
    }
    Ok(model)
}

/// `count` numbers of normal(0, deviation), by Box and Muller's formula in f64.
fn normal(seed: u64, purpose: &str, count: usize, deviation: f64) -> Vec<f32> {
    let mut stream = random::stream(seed, purpose);
    let mut draw = || {
        let (radius, angle) = (1.0 - stream.random::<f64>(), TAU * stream.random::<f64>());
        (deviation * (-2.0 * radius.ln()).sqrt() * angle.cos()) as f32
    };
    (0..count).map(|_| draw()).collect()
}

#[cfg(test)]
mod tests {
    use super::normal;

    #[test]
    fn fresh_weights_have_the_mean_and_the_deviation_asked_for() {
        let values = normal(1, "a", 40_000, 0.5);
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / 4e4;
        let variance = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 4e4;
        assert!(mean.abs() < 0.01 && (variance - 0.25).abs() < 0.01, "{mean} {variance}");
        assert!(values.iter().all(|v| v.is_finite()));
        assert_ne!(values, normal(1, "b", 40_000, 0.5));
    }
}
