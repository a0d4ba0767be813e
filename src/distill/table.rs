//! The table of a distillation: the teacher, the hybrid before training, and each stage.

use serde::{Deserialize, Serialize};

use crate::eval::Scores;
use crate::hybrid::LayerSet;
use crate::model::Model;
use crate::model::config::BlockKind;
use crate::report::table::{Align, Table};

/// One model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What it is.
    pub name: String,
    /// Its Mamba layers, counted from 0.
    pub mamba: Vec<usize>,
    /// Mean negative log-likelihood of held-out tokens, in nats.
    pub loss: f64,
    /// Mean KL(model ‖ teacher) on them, in nats.
    pub kl: Option<f64>,
    /// Share of held-out tokens that both find likeliest.
    pub agreement: Option<f64>,
    /// Share of held-out documents that it answers exactly.
    pub exact: f64,
    /// Bytes of a sequence's cache at the context of the table.
    pub cache_bytes: u64,
    /// Tokens of distillation that went into it, stages before included.
    pub tokens: u64,
}

impl Row {
    /// The row of a model with these scores after so many tokens; its cache is that of a sequence of `context` tokens with
    /// keys and values as the model's device stores them.
    pub fn new(name: &str, model: &Model, scores: &Scores, (context, tokens): (usize, u64)) -> Self {
        let config = model.config();
        Row {
            name: name.to_owned(),
            mamba: config.layers_of(BlockKind::Mamba).collect(),
            loss: scores.cross_entropy,
            kl: scores.teacher.as_ref().map(|teacher| teacher.reverse_kl),
            agreement: scores.teacher.as_ref().map(|teacher| teacher.agreement),
            exact: scores.exact,
            cache_bytes: config.cache_bytes(context, model.activations().size()),
            tokens,
        }
    }
}

/// What a distillation came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Tokens of the sequence whose cache the rows give the bytes of.
    pub context: usize,
    /// Layers of each model.
    pub layers: usize,
    /// Held-out documents.
    pub documents: usize,
    /// The models.
    pub rows: Vec<Row>,
}

impl Summary {
    /// The table; `h1` prints its text and keeps its Markdown.
    pub fn table(&self) -> Table {
        let right = Align::Right;
        let cache = format!("cache at {} tokens", self.context);
        let mut table = Table::new(&[
            ("model", Align::Left),
            ("Mamba", right),
            ("which", Align::Left),
            ("loss", right),
            ("KL to teacher", right),
            ("exact", right),
            (&cache, right),
            ("tokens", right),
        ]);
        for row in &self.rows {
            let which: LayerSet = row.mamba.iter().copied().collect();
            table.row([
                row.name.clone(),
                format!("{} of {}", row.mamba.len(), self.layers),
                which.to_string(),
                format!("{:.4}", row.loss),
                row.kl.map_or(String::new(), |kl| format!("{kl:.4}")),
                format!("{:.1}%", 100.0 * row.exact),
                row.cache_bytes.to_string(),
                row.tokens.to_string(),
            ]);
        }
        table
    }
}
