//! The one place where the sizes of every op are checked, above the backends.

use super::{DeviceId, Error, Order, Out, Result, SEGMENT_FIELDS, SegmentsView, View};

const MOST: usize = 24;

/// Collects the arguments of one op: their shapes as they come, then what may overlap what.
pub(super) struct Check {
    op: &'static str,
    device: DeviceId,
    inputs: [Option<(&'static str, View)>; MOST],
    outputs: [Option<(&'static str, View)>; MOST],
    counts: (usize, usize),
}

impl Check {
    pub(super) fn new(op: &'static str, device: DeviceId) -> Self {
        Check { op, device, inputs: [None; MOST], outputs: [None; MOST], counts: (0, 0) }
    }

    fn shape(&self, argument: &'static str, view: View, rows: usize, cols: usize) -> Result<()> {
        if view.device != self.device {
            return Err(Error::Foreign { op: self.op, argument });
        }
        if (view.rows, view.cols) != (rows, cols) {
            let (expected, found) = ((rows, cols), (view.rows, view.cols));
            return Err(Error::Shape { op: self.op, argument, expected, found });
        }
        Ok(())
    }

    fn storage(&self, argument: &'static str, view: View, fits: bool, expected: &'static str) -> Result<()> {
        if fits {
            return Ok(());
        }
        let order = if view.order == Order::Weight { " in weight order" } else { "" };
        Err(Error::Storage { op: self.op, argument, expected, found: format!("{}{order}", view.dtype) })
    }

    fn read(&mut self, argument: &'static str, view: View) {
        self.inputs[self.counts.0] = Some((argument, view));
        self.counts.0 += 1;
    }

    fn written(&mut self, argument: &'static str, view: View) {
        self.outputs[self.counts.1] = Some((argument, view));
        self.counts.1 += 1;
    }

    /// An input of floating-point rows.
    pub(super) fn input(&mut self, argument: &'static str, view: View, rows: usize, cols: usize) -> Result<()> {
        self.shape(argument, view, rows, cols)?;
        self.storage(argument, view, view.dtype.is_float() && view.order == Order::Rows, "rows of floats")?;
        self.read(argument, view);
        Ok(())
    }

    /// An input that may be absent.
    pub(super) fn maybe(&mut self, name: &'static str, view: Option<View>, rows: usize, cols: usize) -> Result<()> {
        view.map_or(Ok(()), |view| self.input(name, view, rows, cols))
    }

    /// An input of u32 rows.
    pub(super) fn ids(&mut self, argument: &'static str, view: View, rows: usize, cols: usize) -> Result<()> {
        self.shape(argument, view, rows, cols)?;
        self.storage(argument, view, !view.dtype.is_float(), "u32")?;
        self.read(argument, view);
        Ok(())
    }

    /// A linear weight as input.
    pub(super) fn weight(&mut self, argument: &'static str, view: View, rows: usize, cols: usize) -> Result<()> {
        self.shape(argument, view, rows, cols)?;
        let fits = view.dtype.is_float() && view.order == Order::Weight;
        self.storage(argument, view, fits, "a weight in the backend's order")?;
        self.read(argument, view);
        Ok(())
    }

    /// The gradient of a linear weight.
    pub(super) fn weight_grad(&mut self, argument: &'static str, view: View, rows: usize, cols: usize) -> Result<()> {
        self.shape(argument, view, rows, cols)?;
        let fits = view.dtype.is_float() && view.order == Order::Weight;
        self.storage(argument, view, fits, "a gradient in the backend's order of weights")?;
        self.written(argument, view);
        Ok(())
    }

    /// An output of floating-point rows.
    pub(super) fn output(&mut self, argument: &'static str, view: View, rows: usize, cols: usize) -> Result<()> {
        self.shape(argument, view, rows, cols)?;
        self.storage(argument, view, view.dtype.is_float() && view.order == Order::Rows, "rows of floats")?;
        self.written(argument, view);
        Ok(())
    }

    /// An output that may be absent.
    pub(super) fn maybe_output(
        &mut self,
        name: &'static str,
        view: Option<View>,
        rows: usize,
        cols: usize,
    ) -> Result<()> {
        view.map_or(Ok(()), |view| self.output(name, view, rows, cols))
    }

    /// An output that replaces or adds.
    pub(super) fn out(&mut self, argument: &'static str, out: Out, rows: usize, cols: usize) -> Result<()> {
        self.output(argument, out.view, rows, cols)
    }

    /// An output of u32.
    pub(super) fn ids_output(&mut self, argument: &'static str, view: View, rows: usize, cols: usize) -> Result<()> {
        self.shape(argument, view, rows, cols)?;
        self.storage(argument, view, !view.dtype.is_float(), "u32")?;
        self.written(argument, view);
        Ok(())
    }

    /// The segments of `tokens` rows.
    pub(super) fn segments(&mut self, segments: &SegmentsView, tokens: usize) -> Result<()> {
        self.ids("segments", segments.table, segments.table.rows, SEGMENT_FIELDS)?;
        self.ids("positions", segments.positions, 1, tokens)
    }

    /// A state before and after: the same view, or different buffers; as many slots as the input has.
    pub(super) fn state(&mut self, before: Option<View>, after: Option<View>, values: usize) -> Result<()> {
        if let Some(view) = before.filter(|_| before != after) {
            self.input("state_in", view, view.rows, values)?;
        }
        after.map_or(Ok(()), |view| self.output("state_out", view, view.rows, values))
    }

    /// The gradients of the states after and before.
    pub(super) fn state_grads(&mut self, after: Option<View>, before: Option<View>, values: usize) -> Result<()> {
        after.map_or(Ok(()), |view| self.input("dstate_out", view, view.rows, values))?;
        before.map_or(Ok(()), |view| self.output("dstate_in", view, view.rows, values))
    }

    /// A condition on the sizes.
    pub(super) fn require(&self, holds: bool, what: impl FnOnce() -> String) -> Result<()> {
        if holds { Ok(()) } else { Err(Error::Argument { op: self.op, what: what() }) }
    }

    /// No output shares its buffer with an input (a GPU binds whole buffers either to read or to write), and no two
    /// outputs share values.
    pub(super) fn finish(&self) -> Result<()> {
        let outputs = || self.outputs.iter().flatten();
        for (i, (name, output)) in outputs().enumerate() {
            let read = self.inputs.iter().flatten().find(|(_, input)| input.buffer == output.buffer);
            let written = outputs().skip(i + 1).find(|(_, other)| {
                let (a, b) = (output.span(), other.span());
                other.buffer == output.buffer && a.start < b.end && b.start < a.end
            });
            if let Some((other, _)) = read.or(written) {
                return Err(Error::Overlap { op: self.op, output: name, other });
            }
        }
        Ok(())
    }
}

/// An op's arguments: they know how to check themselves.
pub(super) trait Checked {
    /// Checks shapes, storage, devices and overlaps.
    fn check(&self, device: DeviceId) -> Result<()>;
}
