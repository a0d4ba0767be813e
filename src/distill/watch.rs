//! What a distillation says while it runs.

use crate::eval::Scores;
use crate::hybrid::{LayerFit, LayerSet};
use crate::text::cache::Progress;
use crate::train::trainer::StepReport;

use super::importance::Method;

/// What happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// Texts are turned into tokens.
    Tokens(Progress),
    /// So many parts of so many that the device compiles for a stage are done.
    Compiled {
        /// How many.
        done: usize,
        /// Of how many.
        all: usize,
    },
    /// A model was scored.
    Scored {
        /// Which.
        name: &'a str,
        /// How well it does.
        scores: &'a Scores,
    },
    /// Layers are about to be ranked.
    Ranking {
        /// The stage, counted from 1.
        stage: usize,
        /// How.
        method: Method,
        /// How many.
        layers: usize,
    },
    /// The teacher's outputs are about to be kept on the disk.
    TeacherKept {
        /// Bytes that they take.
        bytes: u64,
    },
    /// A layer has its score; none where its run diverged.
    Layer {
        /// The layer.
        layer: usize,
        /// Its score.
        score: Option<f64>,
    },
    /// A stage's layers are known.
    Stage {
        /// The stage, counted from 1.
        stage: usize,
        /// Those that become Mamba.
        new: &'a LayerSet,
        /// All Mamba layers.
        mamba: &'a LayerSet,
        /// Steps of training.
        steps: u64,
    },
    /// A new mixer was fitted.
    Fitted(&'a LayerFit),
    /// A step was done.
    Step {
        /// Its numbers.
        report: &'a StepReport,
        /// Steps of the stage.
        steps: u64,
    },
}

/// Who looks on.
pub trait Watcher {
    /// Something happened.
    fn hear(&mut self, event: Event<'_>);

    /// Whether to stop after the present step of training; the run can be resumed.
    fn interrupted(&self) -> bool {
        false
    }
}
