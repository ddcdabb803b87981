//! The row-major matrix and its products.

use std::ops::{Index, IndexMut};

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, MatMut, MatRef, Par};

/// An element type of [`Matrix`]: f32 or f64.
pub trait Element:
    faer::traits::RealField
    + std::ops::AddAssign
    + std::ops::MulAssign
    + Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + 'static
{
    /// Rounds from f64.
    fn from_f64(value: f64) -> Self;
    /// Widens to f64.
    fn to_f64(self) -> f64;
}

impl Element for f32 {
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Element for f64 {
    fn from_f64(value: f64) -> Self {
        value
    }
    fn to_f64(self) -> f64 {
        self
    }
}

/// How many threads a product may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread only: for products inside an outer parallel loop.
    One,
    /// All threads of the current rayon pool.
    All,
}

impl Threads {
    fn par(self) -> Par {
        match self {
            Self::One => Par::Seq,
            Self::All => Par::rayon(0),
        }
    }
}

/// A dense matrix `[rows, cols]`, row-major, like the tensors of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix<T> {
    rows: usize,
    cols: usize,
    data: Vec<T>,
}

impl<T: Element> Matrix<T> {
    /// All zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            data: vec![T::default(); rows * cols],
        }
    }

    /// Ones on the diagonal.
    pub fn identity(size: usize) -> Self {
        Self::from_fn(size, size, |i, j| {
            T::from_f64(if i == j { 1.0 } else { 0.0 })
        })
    }

    /// Takes row-major data.
    ///
    /// # Panics
    /// When `data` does not hold `rows * cols` elements.
    pub fn from_vec(rows: usize, cols: usize, data: Vec<T>) -> Self {
        assert_eq!(
            data.len(),
            rows * cols,
            "a [{rows}, {cols}] matrix needs {} elements",
            rows * cols
        );
        Self { rows, cols, data }
    }

    /// Element by element.
    pub fn from_fn(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> T) -> Self {
        let mut data = Vec::with_capacity(rows * cols);
        for i in 0..rows {
            for j in 0..cols {
                data.push(f(i, j));
            }
        }
        Self { rows, cols, data }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row-major elements.
    pub fn data(&self) -> &[T] {
        &self.data
    }

    /// Row-major elements, mutable.
    pub fn data_mut(&mut self) -> &mut [T] {
        &mut self.data
    }

    /// Gives the row-major elements away.
    pub fn into_data(self) -> Vec<T> {
        self.data
    }

    /// One row.
    pub fn row(&self, i: usize) -> &[T] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// One row, mutable.
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        &mut self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// The transpose.
    #[must_use]
    pub fn transpose(&self) -> Self {
        Self::from_fn(self.cols, self.rows, |i, j| self[(j, i)])
    }

    /// Rows `start..end`.
    #[must_use]
    pub fn row_range(&self, start: usize, end: usize) -> Self {
        Self {
            rows: end - start,
            cols: self.cols,
            data: self.data[start * self.cols..end * self.cols].to_vec(),
        }
    }

    /// Columns `start..end`.
    #[must_use]
    pub fn col_range(&self, start: usize, end: usize) -> Self {
        let mut data = Vec::with_capacity(self.rows * (end - start));
        for i in 0..self.rows {
            data.extend_from_slice(&self.row(i)[start..end]);
        }
        Self {
            rows: self.rows,
            cols: end - start,
            data,
        }
    }

    /// `self` above `below`.
    ///
    /// # Panics
    /// When the widths differ.
    #[must_use]
    pub fn stack(&self, below: &Self) -> Self {
        assert_eq!(self.cols, below.cols, "stacked matrices share a width");
        let mut data = self.data.clone();
        data.extend_from_slice(&below.data);
        Self {
            rows: self.rows + below.rows,
            cols: self.cols,
            data,
        }
    }

    /// Every element times `factor`.
    pub fn scale(&mut self, factor: T) {
        for x in &mut self.data {
            *x *= factor;
        }
    }

    /// Adds `factor * other`.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn add_scaled(&mut self, other: &Self, factor: T) {
        assert_eq!(
            (self.rows, self.cols),
            (other.rows, other.cols),
            "summands share a shape"
        );
        for (x, y) in self.data.iter_mut().zip(&other.data) {
            *x += *y * factor;
        }
    }

    /// The same numbers in another element type.
    pub fn cast<U: Element>(&self) -> Matrix<U> {
        Matrix {
            rows: self.rows,
            cols: self.cols,
            data: self.data.iter().map(|x| U::from_f64(x.to_f64())).collect(),
        }
    }

    /// Whether every element is finite.
    pub fn is_finite(&self) -> bool {
        self.data.iter().all(|x| x.to_f64().is_finite())
    }

    /// Sum of the diagonal.
    pub fn trace(&self) -> f64 {
        (0..self.rows.min(self.cols))
            .map(|i| self[(i, i)].to_f64())
            .sum()
    }

    /// faer's view.
    pub fn view(&self) -> MatRef<'_, T> {
        MatRef::from_row_major_slice(&self.data, self.rows, self.cols)
    }

    /// faer's mutable view.
    pub fn view_mut(&mut self) -> MatMut<'_, T> {
        MatMut::from_row_major_slice_mut(&mut self.data, self.rows, self.cols)
    }

    /// A copy of a faer matrix.
    pub fn from_view(view: MatRef<'_, T>) -> Self {
        Self::from_fn(view.nrows(), view.ncols(), |i, j| view[(i, j)])
    }

    /// `self * other`.
    #[must_use]
    pub fn times(&self, other: &Self) -> Self {
        product(self.view(), other.view())
    }

    /// `self * other^T`.
    #[must_use]
    pub fn times_transposed(&self, other: &Self) -> Self {
        product(self.view(), other.view().transpose())
    }

    /// `self^T * other`.
    #[must_use]
    pub fn transposed_times(&self, other: &Self) -> Self {
        product(self.view().transpose(), other.view())
    }

    /// `self * middle * self^T`, made exactly symmetric.
    #[must_use]
    pub fn congruence(&self, middle: &Self) -> Self {
        let mut result = self.times(middle).times_transposed(self);
        result.symmetrise();
        result
    }

    /// Replaces the matrix by the mean of itself and its transpose.
    pub fn symmetrise(&mut self) {
        let half = T::from_f64(0.5);
        for i in 0..self.rows {
            for j in 0..i {
                let mean = (self[(i, j)] + self[(j, i)]) * half;
                self[(i, j)] = mean;
                self[(j, i)] = mean;
            }
        }
    }
}

impl<T> Index<(usize, usize)> for Matrix<T> {
    type Output = T;
    fn index(&self, (i, j): (usize, usize)) -> &T {
        debug_assert!(i < self.rows && j < self.cols);
        &self.data[i * self.cols + j]
    }
}

impl<T> IndexMut<(usize, usize)> for Matrix<T> {
    fn index_mut(&mut self, (i, j): (usize, usize)) -> &mut T {
        debug_assert!(i < self.rows && j < self.cols);
        &mut self.data[i * self.cols + j]
    }
}

fn product<T: Element>(a: MatRef<'_, T>, b: MatRef<'_, T>) -> Matrix<T> {
    let mut out = Matrix::zeros(a.nrows(), b.ncols());
    gemm(out.view_mut(), false, a, b, 1.0, Threads::All);
    out
}

/// `out (+)= factor * a * b` for any strides; sums onto `out` when `accumulate`.
///
/// # Panics
/// When the shapes do not fit.
pub fn gemm<T: Element>(
    out: MatMut<'_, T>,
    accumulate: bool,
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    factor: f64,
    threads: Threads,
) {
    let accum = if accumulate {
        Accum::Add
    } else {
        Accum::Replace
    };
    // A product this small costs less than waking the second thread.
    let small = a.nrows() * a.ncols() * b.ncols() < 1 << 18;
    let par = if small { Par::Seq } else { threads.par() };
    matmul(out, accum, a, b, T::from_f64(factor), par);
}

/// Adds `x^T x` of the rows of `x` `[n, m]` to `total` `[m, m]`; the product runs in f32, the sum
/// over calls in f64.
pub fn gram_accumulate(total: &mut Matrix<f64>, x: MatRef<'_, f32>, threads: Threads) {
    let m = x.ncols();
    let mut part = Matrix::<f32>::zeros(m, m);
    triangular::matmul(
        part.view_mut(),
        BlockStructure::TriangularLower,
        Accum::Replace,
        x.transpose(),
        BlockStructure::Rectangular,
        x,
        BlockStructure::Rectangular,
        1.0,
        threads.par(),
    );
    for i in 0..m {
        for j in 0..=i {
            let value = f64::from(part[(i, j)]);
            total[(i, j)] += value;
            if i != j {
                total[(j, i)] += value;
            }
        }
    }
}
