//! The arguments of an op as the kernels see them.

use half::{bf16, f16};

use super::matrix::{PANEL, Panels, Rows, RowsMut};
use super::segment::Segment;
use super::simd::Element;
use crate::backend::host::{HostMemory, Place, Value, table};
use crate::backend::{DType, Error, Order, Result, SEGMENT_FIELDS, SegmentsView, View, padded_rows};

/// Evaluates an expression with `$type` standing for the type in which a view is stored, f32, bf16 or f16.
macro_rules! with_float {
    ($call:expr, $argument:expr, $view:expr, $type:ident => $body:expr) => {
        match $view.dtype {
            crate::backend::DType::F32 => {
                type $type = f32;
                $body
            }
            crate::backend::DType::Bf16 => {
                type $type = half::bf16;
                $body
            }
            crate::backend::DType::F16 => {
                type $type = half::f16;
                $body
            }
            _ => Err($call.unsupported($argument, $view)),
        }
    };
}
pub(super) use with_float;

/// A call under way, which holds the memory: matrices of it live as long, since no buffer is freed meanwhile. Which of them may
/// lie on the same values, [`Device`](crate::backend::Device) has checked.
pub(super) struct Call<'m> {
    pub op: &'static str,
    pub memory: &'m mut HostMemory,
}

impl<'m> Call<'m> {
    pub fn unsupported(&self, argument: &str, view: View) -> Error {
        Error::Unsupported { backend: "cpu", op: self.op, what: format!("{argument} of {}", view.dtype) }
    }

    /// Where a view of values of type `T` lies.
    fn place<T: Value>(&mut self, argument: &str, view: View) -> Result<Place> {
        let place = self.memory.place(view)?;
        if view.dtype == T::DTYPE { Ok(place) } else { Err(self.unsupported(argument, view)) }
    }

    /// Rows to read, of any type.
    pub fn rows_of<T: Value>(&mut self, argument: &str, view: View) -> Result<Rows<'m, T>> {
        let place = self.place::<T>(argument, view)?;
        // SAFETY: the view lies in a buffer of this type, which the call holds.
        Ok(unsafe { Rows::from_raw(place.start(), view.rows, view.cols, view.stride) })
    }

    /// Rows to write, of any type.
    pub fn rows_mut_of<T: Value>(&mut self, argument: &str, view: View) -> Result<RowsMut<'m, T>> {
        let place = self.place::<T>(argument, view)?;
        // SAFETY: the view lies in a buffer of this type, which the call holds, its rows apart.
        Ok(unsafe { RowsMut::from_raw(place.start(), view.rows, view.cols, view.stride) })
    }

    /// Rows of f32 to read.
    pub fn rows(&mut self, argument: &str, view: View) -> Result<Rows<'m>> {
        self.rows_of(argument, view)
    }

    /// Rows of f32 to write.
    pub fn rows_mut(&mut self, argument: &str, view: View) -> Result<RowsMut<'m>> {
        self.rows_mut_of(argument, view)
    }

    /// Rows of f32 that may be absent.
    pub fn maybe_rows(&mut self, argument: &str, view: Option<View>) -> Result<Option<Rows<'m>>> {
        view.map(|view| self.rows(argument, view)).transpose()
    }

    /// Rows of f32 to write that may be absent.
    pub fn maybe_rows_mut(&mut self, argument: &str, view: Option<View>) -> Result<Option<RowsMut<'m>>> {
        view.map(|view| self.rows_mut(argument, view)).transpose()
    }

    /// The values of one row.
    pub fn slice_of<T: Value>(&mut self, argument: &str, view: View) -> Result<&'m [T]> {
        let rows = self.rows_of(argument, View { rows: view.rows.min(1), ..view })?;
        Ok(if view.is_empty() { &[] } else { rows.row(0) })
    }

    /// The values of one row of f32.
    pub fn slice(&mut self, argument: &str, view: View) -> Result<&'m [f32]> {
        self.slice_of(argument, view)
    }

    /// The values of one row of f32 that may be absent.
    pub fn maybe_slice(&mut self, argument: &str, view: Option<View>) -> Result<Option<&'m [f32]>> {
        view.map(|view| self.slice(argument, view)).transpose()
    }

    /// The values of one row of f32 to write that may be absent.
    pub fn maybe_slice_mut(&mut self, argument: &str, view: Option<View>) -> Result<Option<&'m mut [f32]>> {
        let rows = self.maybe_rows_mut(argument, view)?;
        // SAFETY: the row is an output, which nothing else of the call touches.
        Ok(rows.map(|rows| unsafe { rows.shared_row(0) }))
    }

    /// The gradient of a linear weight.
    pub fn panels_mut(&mut self, argument: &str, view: View) -> Result<&'m mut [f32]> {
        let place = self.place::<f32>(argument, view)?;
        // SAFETY: the view's span lies in a buffer of f32, which the call holds, and is an output.
        Ok(unsafe { std::slice::from_raw_parts_mut(place.start(), view.span().len()) })
    }

    /// A small parameter in rows, as f32: itself, or a copy of it.
    pub fn parameter(&mut self, argument: &str, view: View, copy: &'m mut Vec<f32>) -> Result<Rows<'m>> {
        fn widen<T: Element>(rows: Rows<'_, T>, copy: &mut Vec<f32>) {
            (0..rows.rows()).for_each(|row| copy.extend(rows.row(row).iter().map(|value| value.widen())));
        }
        copy.clear();
        match view.dtype {
            DType::F32 => return self.rows(argument, view),
            DType::Bf16 => widen(self.rows_of::<bf16>(argument, view)?, copy),
            DType::F16 => widen(self.rows_of::<f16>(argument, view)?, copy),
            DType::F64 | DType::U32 => return Err(self.unsupported(argument, view)),
        }
        Ok(Rows::dense(copy, view.rows, view.cols))
    }

    /// A small parameter of one row that may be absent.
    pub fn maybe_parameter(
        &mut self,
        argument: &str,
        view: Option<View>,
        copy: &'m mut Vec<f32>,
    ) -> Result<Option<&'m [f32]>> {
        view.map(|view| self.parameter(argument, view, copy).map(|rows| rows.row(0))).transpose()
    }

    /// A linear weight.
    pub fn panels<T: Value>(&mut self, argument: &str, view: View) -> Result<Panels<'m, T>> {
        let place = self.place::<T>(argument, view)?;
        // SAFETY: the view's span lies in a buffer of this type, which the call holds.
        let values = unsafe { std::slice::from_raw_parts(place.start(), view.span().len()) };
        Ok(Panels::new(values, view.rows, view.cols))
    }

    /// A linear weight, or what is shaped like it, as the matrix that it is in memory: rows of [`PANEL`] outputs.
    pub fn panels_as_rows(&mut self, view: View) -> Result<View> {
        self.memory.place(view)?;
        let rows = padded_rows(view.rows) / PANEL * view.cols;
        Ok(View { order: Order::Rows, rows, cols: PANEL, stride: PANEL, ..view })
    }

    /// Numbers below a bound.
    pub fn ids_below(&mut self, argument: &str, view: View, bound: usize) -> Result<&'m [u32]> {
        let ids: &[u32] = self.slice_of(argument, view)?;
        table::below(self.op, argument, ids.iter().copied(), bound)?;
        Ok(ids)
    }

    /// All values of a view of u32, which must have no gaps.
    fn table_values(&mut self, argument: &'static str, view: View) -> Result<&'m [u32]> {
        if view.rows > 1 && view.stride != view.cols {
            return Err(Error::Argument { op: self.op, what: format!("{argument} has gaps between its rows") });
        }
        self.slice_of(argument, View { rows: view.rows.min(1), cols: view.len(), stride: view.len(), ..view })
    }

    /// The segments, once they are known to cover `tokens` rows.
    pub fn segments(&mut self, segments: &SegmentsView, tokens: usize) -> Result<&'m [Segment]> {
        self.slice_of::<u32>("positions", segments.positions)?;
        let (rows, _) = self.table_values("segments", segments.table)?.as_chunks::<SEGMENT_FIELDS>();
        table::cover(self.op, rows, tokens)?;
        Ok(bytemuck::cast_slice(rows))
    }

    /// Checks the slots of the states that are there.
    pub fn slots(&self, segments: &[Segment], states: &[Option<View>]) -> Result<()> {
        let rows = bytemuck::cast_slice(segments);
        states.iter().flatten().try_for_each(|view| table::slots(self.op, rows, view.rows))
    }

    /// The pages of slots, once every position that will be looked up is known to lie in one of `rows` rows.
    pub fn pages(
        &mut self,
        segments: &[Segment],
        pages: View,
        page_size: usize,
        rows: usize,
        own_rows: bool,
    ) -> Result<Rows<'m, u32>> {
        let values = self.table_values("pages", pages)?;
        let checked = table::Pages { table: values, width: pages.cols, page_size, rows };
        checked.check(self.op, bytemuck::cast_slice(segments), own_rows)?;
        Ok(Rows::dense(values, pages.rows, pages.cols))
    }
}
