//! Short forms for the nodes that builders add most.

use super::{
    Binary, Compare, DType, Dim, GraphBuilder, InlineTensor, Op, Transform, Unary, ValueId,
    WeightRef,
};
use crate::error::NodeError;

type Result<T> = std::result::Result<T, NodeError>;

/// Arithmetic and matrices.
impl GraphBuilder {
    /// `a + b`.
    pub fn add(&mut self, name: &str, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.node(name, Op::Binary(Binary::Add), &[a, b])
    }

    /// `a - b`.
    pub fn sub(&mut self, name: &str, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.node(name, Op::Binary(Binary::Sub), &[a, b])
    }

    /// `a * b`.
    pub fn mul(&mut self, name: &str, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.node(name, Op::Binary(Binary::Mul), &[a, b])
    }

    /// `x * factor`; `x` itself when the factor is 1.
    pub fn scale(&mut self, name: &str, x: ValueId, factor: f64) -> Result<ValueId> {
        if (factor - 1.0).abs() < f64::EPSILON {
            return Ok(x);
        }
        let factor = InlineTensor::float(self.ty(x).dtype, &[], &[factor as f32]);
        let factor = self.constant(factor);
        self.mul(name, x, factor)
    }

    /// Comparison.
    pub fn compare(
        &mut self,
        name: &str,
        kind: Compare,
        a: ValueId,
        b: ValueId,
    ) -> Result<ValueId> {
        self.node(name, Op::Compare(kind), &[a, b])
    }

    /// Elementwise function.
    pub fn unary(&mut self, name: &str, kind: Unary, x: ValueId) -> Result<ValueId> {
        self.node(name, Op::Unary(kind), &[x])
    }

    /// `x` as `dtype`; `x` itself when it has that type.
    pub fn cast(&mut self, name: &str, x: ValueId, dtype: DType) -> Result<ValueId> {
        if self.ty(x).dtype == dtype {
            return Ok(x);
        }
        self.node(name, Op::Cast { to: dtype }, &[x])
    }

    /// Matrix product over the last two axes.
    pub fn matmul(&mut self, name: &str, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.node(name, Op::MatMul, &[a, b])
    }

    /// `x [.., in] -> [.., out]` by the checkpoint's `{tensor}.weight` `[out, in]` and, when `bias`,
    /// `{tensor}.bias` `[out]`, in the type of `x`.
    pub fn linear(
        &mut self,
        name: &str,
        x: ValueId,
        tensor: &str,
        out: usize,
        input: usize,
        bias: bool,
    ) -> Result<ValueId> {
        let dtype = self.ty(x).dtype;
        let weight = WeightRef {
            name: format!("{tensor}.weight"),
            source_shape: vec![out, input],
            transform: Transform::AsIs,
            dtype,
            shape: vec![out, input],
        };
        let stored = self.multiplies_stored(&weight.name, dtype);
        let bias_of = |b: &mut Self| b.vector(&format!("{tensor}.bias"), out, dtype);
        if stored {
            let weight = self.stored_weight(weight);
            let mut inputs = vec![x, weight];
            if bias {
                inputs.push(bias_of(self));
            }
            return self.node(name, Op::Linear16, &inputs);
        }
        let product = self.product(name, x, weight)?;
        if !bias {
            return Ok(product);
        }
        let bias = bias_of(self);
        self.add(&format!("{name}.bias"), product, bias)
    }

    /// The product with a tensor `[out, in]` in standard operators: stored `[in, out]`, cast where it is read.
    pub(crate) fn product(&mut self, name: &str, x: ValueId, weight: WeightRef) -> Result<ValueId> {
        let shape = weight.source_shape.iter().rev().copied().collect();
        let weight = self.cast_weight(WeightRef {
            transform: Transform::Transpose2D,
            shape,
            ..weight
        })?;
        self.matmul(name, x, weight)
    }

    /// A tensor of the checkpoint with one axis, as it is.
    pub fn vector(&mut self, tensor: &str, len: usize, dtype: DType) -> ValueId {
        self.weight(WeightRef {
            name: tensor.to_owned(),
            source_shape: vec![len],
            transform: Transform::AsIs,
            dtype,
            shape: vec![len],
        })
    }

    /// Softmax over the last axis.
    pub fn softmax(&mut self, name: &str, x: ValueId) -> Result<ValueId> {
        let axis = self.ty(x).rank().saturating_sub(1);
        self.node(name, Op::Softmax { axis }, &[x])
    }
}

/// Shapes.
impl GraphBuilder {
    /// Constant i64 with one axis.
    pub fn ints(&mut self, values: &[i64]) -> ValueId {
        self.constant(InlineTensor::i64(&[values.len()], values))
    }

    /// Permutation of axes.
    pub fn transpose(&mut self, name: &str, x: ValueId, perm: &[usize]) -> Result<ValueId> {
        self.node(
            name,
            Op::Transpose {
                perm: perm.to_vec(),
            },
            &[x],
        )
    }

    /// Joins along `axis`.
    pub fn concat(&mut self, name: &str, parts: &[ValueId], axis: usize) -> Result<ValueId> {
        self.node(name, Op::Concat { axis }, parts)
    }

    /// Parts of fixed sizes along `axis`.
    pub fn split(
        &mut self,
        name: &str,
        x: ValueId,
        axis: usize,
        sizes: &[usize],
    ) -> Result<Vec<ValueId>> {
        let sizes: Vec<i64> = sizes.iter().map(|&s| s as i64).collect();
        let sizes = self.ints(&sizes);
        self.apply(name, Op::Split { axis }, &[Some(x), Some(sizes)])
    }

    /// `start..end` of `axis`.
    pub fn slice(
        &mut self,
        name: &str,
        x: ValueId,
        axis: usize,
        range: std::ops::Range<usize>,
    ) -> Result<ValueId> {
        let starts = self.ints(&[range.start as i64]);
        let ends = self.ints(&[range.end as i64]);
        let axes = self.ints(&[axis as i64]);
        self.node(name, Op::Slice, &[x, starts, ends, axes])
    }

    /// What `axis` has from `start` (i64 `[1]`) on.
    pub fn slice_from(
        &mut self,
        name: &str,
        x: ValueId,
        axis: usize,
        start: ValueId,
    ) -> Result<ValueId> {
        let ends = self.ints(&[i64::MAX]);
        let axes = self.ints(&[axis as i64]);
        self.node(name, Op::Slice, &[x, start, ends, axes])
    }

    /// The last `count` of `axis`, all when there are fewer; `size` is the symbol of how many.
    pub fn tail(
        &mut self,
        name: &str,
        x: ValueId,
        axis: usize,
        count: usize,
        size: &str,
    ) -> Result<ValueId> {
        let starts = self.ints(&[-(count as i64)]);
        let ends = self.ints(&[i64::MAX]);
        let axes = self.ints(&[axis as i64]);
        let op = Op::Tail { size: size.into() };
        self.node(name, op, &[x, starts, ends, axes])
    }

    /// Inserts axes of size 1.
    pub fn unsqueeze(&mut self, name: &str, x: ValueId, axes: &[i64]) -> Result<ValueId> {
        let axes = self.ints(axes);
        self.node(name, Op::Unsqueeze, &[x, axes])
    }

    /// Broadcasts to `shape`.
    pub fn expand(&mut self, name: &str, x: ValueId, shape: &[Dim]) -> Result<ValueId> {
        let shape = self.shape_value(shape)?;
        self.node(name, Op::Expand, &[x, shape])
    }

    /// `x` with another shape of as many elements. A constant shape with 0 (copy the axis) and one
    /// -1 where that says it, else a shape computed at run time; `x` itself when it has the shape.
    pub fn reshape(&mut self, name: &str, x: ValueId, shape: &[Dim]) -> Result<ValueId> {
        if self.shape(x) == shape {
            return Ok(x);
        }
        let mut open = 0;
        let sizes: Vec<i64> = shape
            .iter()
            .enumerate()
            .map(|(i, dim)| match dim.as_constant() {
                Some(n) => n,
                None if self.shape(x).get(i) == Some(dim) => 0,
                None => {
                    open += 1;
                    -1
                }
            })
            .collect();
        let target = if open <= 1 {
            self.ints(&sizes)
        } else {
            self.shape_value(shape)?
        };
        self.node(name, Op::Reshape, &[x, target])
    }

    /// An i64 `[rank]` value that holds `shape` at run time.
    pub fn shape_value(&mut self, shape: &[Dim]) -> Result<ValueId> {
        let known: Option<Vec<i64>> = shape.iter().map(Dim::as_constant).collect();
        if let Some(sizes) = known {
            return Ok(self.ints(&sizes));
        }
        if let Some(&id) = self.shapes.get(shape) {
            return Ok(id);
        }
        let parts = shape
            .iter()
            .map(|d| self.dim_value(d))
            .collect::<Result<Vec<_>>>()?;
        let text: Vec<String> = shape.iter().map(ToString::to_string).collect();
        let name = format!("shape.{}", text.join("_"));
        let id = match parts.as_slice() {
            [one] => *one,
            _ => self.top_level(|b| b.concat(&name, &parts, 0))?,
        };
        self.shapes.insert(shape.to_vec(), id);
        Ok(id)
    }

    /// An i64 `[1]` value that holds `dim` at run time: read off the first value that has such
    /// an axis, or the sum of values for its terms.
    pub fn dim_value(&mut self, dim: &Dim) -> Result<ValueId> {
        if let Some(n) = dim.as_constant() {
            return Ok(self.ints(&[n]));
        }
        if let Some(&id) = self.dims.get(dim) {
            return Ok(id);
        }
        let found = self.graph().values().find_map(|(id, value)| {
            value
                .ty
                .shape
                .iter()
                .position(|d| d == dim)
                .map(|axis| (id, axis))
        });
        let id = match (found, dim.split_term()) {
            (Some((value, axis)), _) => {
                let op = Op::Shape {
                    start: axis,
                    end: axis + 1,
                };
                self.top_level(|b| b.node(&format!("dim.{dim}"), op, &[value]))?
            }
            (None, Some((first, rest))) => {
                let rest = self.dim_value(&rest)?;
                let first = self.dim_value(&first)?;
                self.top_level(|b| b.add(&format!("dim.{dim}"), rest, first))?
            }
            (None, None) => {
                return Err(NodeError {
                    node: format!("dim.{dim} (Shape)"),
                    expected: format!("a value with an axis of size {dim}"),
                    found: "none in the graph".to_owned(),
                });
            }
        };
        self.dims.insert(dim.clone(), id);
        Ok(id)
    }

    /// An i64 scalar that holds `dim` at run time.
    pub fn dim_scalar(&mut self, dim: &Dim) -> Result<ValueId> {
        if let Some(n) = dim.as_constant() {
            return Ok(self.constant(InlineTensor::i64(&[], &[n])));
        }
        if let Some(&id) = self.scalars.get(dim) {
            return Ok(id);
        }
        let value = self.dim_value(dim)?;
        let axes = self.ints(&[0]);
        let name = format!("scalar.{dim}");
        let id = self.top_level(|b| b.node(&name, Op::Squeeze, &[value, axes]))?;
        self.scalars.insert(dim.clone(), id);
        Ok(id)
    }
}
