//! The parameters of a model: one table of name → range, shared by weights, gradients, masters and moments.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::config::ModelConfig;
use super::tensors::{Role, TensorSpec};
use crate::backend::{self, Buffer, DType, Device, HostSlice, Order, View, padded_rows};

/// Ranges start at multiples of this many values, 256 bytes of f32: the strictest alignment of a binding.
const ALIGNMENT: usize = 64;

/// A parameter's place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ParameterId(usize);

impl ParameterId {
    pub(super) fn index(self) -> usize {
        self.0
    }
}

/// Which of the two flat spaces a parameter lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Linear weights and embeddings, in the storage dtype, `Order::Weight`.
    Matrices,
    /// Everything else, always f32, `Order::Rows`.
    Vectors,
}

/// One parameter: what it is and where it lies.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Name, shape and role, as in the checkpoint.
    pub spec: TensorSpec,
    /// The flat space.
    pub part: Part,
    /// Its values in that space, padding rows included.
    pub range: Range<usize>,
    rows: usize,
    cols: usize,
}

/// The table of a model's parameters. Matrices come in the order of the layers; vectors with weight decay before
/// those without, so that an update of everything is three ranges.
#[derive(Debug)]
pub struct ParameterTable {
    list: Vec<Parameter>,
    index: HashMap<String, ParameterId>,
    matrices: usize,
    vectors: usize,
}

impl ParameterTable {
    /// The table of a configuration.
    pub fn new(config: &ModelConfig) -> Self {
        let mut list: Vec<Parameter> = config.tensors().into_iter().map(Parameter::unplaced).collect();
        list.sort_by_key(|p| (p.part == Part::Vectors, p.part == Part::Vectors && !p.spec.decayed));
        let mut ends = [0, 0];
        for parameter in &mut list {
            let end = &mut ends[parameter.part as usize];
            let len = match parameter.part {
                Part::Matrices => padded_rows(parameter.rows) * parameter.cols,
                Part::Vectors => parameter.rows * parameter.cols,
            };
            parameter.range = *end..*end + len;
            *end = (*end + len).next_multiple_of(ALIGNMENT);
        }
        let index = list.iter().enumerate().map(|(i, p)| (p.spec.name.clone(), ParameterId(i))).collect();
        ParameterTable { list, index, matrices: ends[0], vectors: ends[1] }
    }

    /// The parameter of a name.
    pub fn find(&self, name: &str) -> Option<ParameterId> {
        self.index.get(name).copied()
    }

    /// One parameter.
    pub fn get(&self, id: ParameterId) -> &Parameter {
        &self.list[id.0]
    }

    /// All of them, in the order of their ranges.
    pub fn iter(&self) -> impl Iterator<Item = (ParameterId, &Parameter)> {
        self.list.iter().enumerate().map(|(i, p)| (ParameterId(i), p))
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Values of one space, padding included.
    pub fn values(&self, part: Part) -> usize {
        match part {
            Part::Matrices => self.matrices,
            Part::Vectors => self.vectors,
        }
    }

    /// Neighbouring parameters of one space that `chosen` holds for, and that agree in weight decay, as ranges as long
    /// as they can be: `(space, range, decayed)`.
    pub fn ranges(&self, chosen: impl Fn(&Parameter) -> bool) -> Vec<(Part, Range<usize>, bool)> {
        let mut ranges: Vec<(Part, Range<usize>, bool)> = Vec::new();
        let mut joins = false;
        for parameter in &self.list {
            if !chosen(parameter) {
                joins = false;
                continue;
            }
            match ranges.last_mut() {
                Some((part, range, decayed))
                    if joins && *part == parameter.part && *decayed == parameter.spec.decayed =>
                {
                    range.end = parameter.range.end;
                }
                _ => ranges.push((parameter.part, parameter.range.clone(), parameter.spec.decayed)),
            }
            joins = true;
        }
        ranges
    }
}

impl Parameter {
    fn unplaced(spec: TensorSpec) -> Self {
        let part = match spec.role {
            Role::Matrix | Role::Embedding => Part::Matrices,
            _ => Part::Vectors,
        };
        let (rows, cols) = match spec.shape.as_slice() {
            [] => (1, 1),
            [n] => (1, *n),
            [rows, rest @ ..] => (*rows, rest.iter().product()),
        };
        Parameter { spec, part, range: 0..0, rows, cols }
    }
}

/// Values for every parameter of a table: the weights, or gradients, or moments.
#[derive(Debug)]
pub struct Space {
    table: Arc<ParameterTable>,
    matrices: Buffer,
    vectors: Buffer,
}

impl Space {
    /// Zeros for every parameter; matrices in `dtype`, the rest in f32.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(device: &Device, table: &Arc<ParameterTable>, dtype: DType) -> backend::Result<Self> {
        let small = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        Ok(Space {
            matrices: device.alloc(dtype, 1, table.values(Part::Matrices))?,
            vectors: device.alloc(small, 1, table.values(Part::Vectors))?,
            table: Arc::clone(table),
        })
    }

    /// The table.
    pub fn table(&self) -> &Arc<ParameterTable> {
        &self.table
    }

    /// The whole of one part, `[1, values]`.
    pub fn part(&self, part: Part) -> View {
        match part {
            Part::Matrices => self.matrices.view(),
            Part::Vectors => self.vectors.view(),
        }
    }

    /// A range of one part, `[1, values]`.
    ///
    /// # Errors
    /// When the range does not lie in the part.
    pub fn range(&self, part: Part, range: &Range<usize>) -> backend::Result<View> {
        self.part(part).col_range(range.start, range.len())
    }

    /// One parameter as the matrix that ops take: `[out, in]` in weight order, `[1, n]`, or `[channels, width]`.
    ///
    /// # Errors
    /// When the id is of another table.
    pub fn view(&self, id: ParameterId) -> backend::Result<View> {
        let parameter = self.table.get(id);
        let order = match parameter.part {
            Part::Matrices => Order::Weight,
            Part::Vectors => Order::Rows,
        };
        self.part(parameter.part).matrix(parameter.range.start, parameter.rows, parameter.cols, order)
    }

    /// Parameters that lie one after the other, without padding between them, as one: matrices `[Σ out, in]`, vectors
    /// `[1, Σ n]`; `None` where they do not.
    ///
    /// # Errors
    /// When an id is of another table.
    pub fn joined<const N: usize>(&self, ids: [ParameterId; N]) -> backend::Result<Option<View>> {
        let parts = ids.map(|id| self.table.get(id));
        let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return Ok(None) };
        let (part, width) = (first.part, |p: &Parameter| if p.part == Part::Matrices { p.cols } else { 1 });
        let follows = |pair: &[&Parameter]| {
            let [one, next] = [pair[0], pair[1]];
            let full = one.range.len() == one.rows * one.cols;
            full && one.range.end == next.range.start && next.part == part && width(one) == width(next)
        };
        if !parts.windows(2).all(follows) {
            return Ok(None);
        }
        let values = parts.iter().map(|p| p.rows * p.cols).sum::<usize>();
        let (rows, cols, order) = match part {
            Part::Matrices => (values / width(last).max(1), last.cols, Order::Weight),
            Part::Vectors => (1, values, Order::Rows),
        };
        self.part(part).matrix(first.range.start, rows, cols, order).map(Some)
    }

    /// Writes row-major values of one parameter.
    ///
    /// # Errors
    /// When their number is not the parameter's.
    pub fn write(&self, device: &Device, id: ParameterId, values: &[f32]) -> backend::Result<()> {
        device.write(HostSlice::F32(values), self.view(id)?)
    }

    /// Reads one parameter, row-major.
    ///
    /// # Errors
    /// When the device was lost.
    pub fn read(&self, device: &Device, id: ParameterId) -> backend::Result<Vec<f32>> {
        device.read(self.view(id)?)?.wait()
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.matrices.bytes() + self.vectors.bytes()
    }
}
