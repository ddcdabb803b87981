//! Symbolic dimensions: polynomials with integer coefficients over named symbols.
//!
//! `batch`, `past+seq` and `9*seq` are dimensions; so is `64`. Two dimensions are equal when their
//! polynomials are, so `(past+seq)*batch` equals `batch*past + batch*seq`.

use std::{
    fmt,
    ops::{Add, Mul, Sub},
    sync::Arc,
};

/// A dimension, or an integer computed from dimensions (then it may be negative).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dim {
    /// Sorted by monomial, factors not zero.
    terms: Vec<Term>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Term {
    monomial: Monomial,
    factor: i64,
}

/// Sorted symbols, a power as a repetition. Ordered by degree, then by name: an admissible order,
/// which polynomial division needs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Monomial(Vec<Arc<str>>);

impl Ord for Monomial {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0
            .len()
            .cmp(&other.0.len())
            .then_with(|| self.0.cmp(&other.0))
    }
}

impl PartialOrd for Monomial {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Monomial {
    fn times(&self, other: &Self) -> Self {
        let mut all: Vec<_> = self.0.iter().chain(&other.0).cloned().collect();
        all.sort();
        Self(all)
    }

    fn divided_by(&self, other: &Self) -> Option<Self> {
        let mut rest = self.0.clone();
        for symbol in &other.0 {
            let at = rest.iter().position(|s| s == symbol)?;
            rest.remove(at);
        }
        Some(Self(rest))
    }
}

impl Dim {
    /// A fixed size.
    pub fn known(n: usize) -> Self {
        Self::constant(n as i64)
    }

    /// A fixed integer, possibly negative.
    pub fn constant(n: i64) -> Self {
        Self::from_terms(vec![Term {
            monomial: Monomial(vec![]),
            factor: n,
        }])
    }

    /// A size known at run time only.
    pub fn symbol(name: &str) -> Self {
        Self {
            terms: vec![Term {
                monomial: Monomial(vec![name.into()]),
                factor: 1,
            }],
        }
    }

    fn from_terms(mut terms: Vec<Term>) -> Self {
        terms.sort_by(|a, b| a.monomial.cmp(&b.monomial));
        let mut merged: Vec<Term> = Vec::with_capacity(terms.len());
        for term in terms {
            match merged.last_mut() {
                Some(last) if last.monomial == term.monomial => last.factor += term.factor,
                _ => merged.push(term),
            }
        }
        merged.retain(|t| t.factor != 0);
        Self { terms: merged }
    }

    /// The value, when no symbol occurs.
    pub fn as_constant(&self) -> Option<i64> {
        match self.terms.as_slice() {
            [] => Some(0),
            [t] if t.monomial.0.is_empty() => Some(t.factor),
            _ => None,
        }
    }

    /// The size, when no symbol occurs and it is not negative.
    pub fn as_known(&self) -> Option<usize> {
        self.as_constant().and_then(|n| usize::try_from(n).ok())
    }

    /// Whether this is the fixed size 1.
    pub fn is_one(&self) -> bool {
        self.as_constant() == Some(1)
    }

    /// The first term and the sum of the others; `None` when there is but one.
    pub fn split_term(&self) -> Option<(Self, Self)> {
        let [first, rest @ ..] = self.terms.as_slice() else {
            return None;
        };
        let some = |terms: &[Term]| Self {
            terms: terms.to_vec(),
        };
        (!rest.is_empty()).then(|| (some(std::slice::from_ref(first)), some(rest)))
    }

    /// The names that occur, sorted, each once.
    pub fn symbols(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self
            .terms
            .iter()
            .flat_map(|t| t.monomial.0.iter().map(AsRef::as_ref))
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// `self / divisor` when the division leaves no remainder for every value of the symbols.
    pub fn exact_div(&self, divisor: &Self) -> Option<Self> {
        let lead = divisor.terms.last()?;
        let mut rest = self.clone();
        let mut quotient = Vec::new();
        while let Some(top) = rest.terms.last() {
            if top.factor % lead.factor != 0 {
                return None;
            }
            let term = Term {
                monomial: top.monomial.divided_by(&lead.monomial)?,
                factor: top.factor / lead.factor,
            };
            let step = Self {
                terms: vec![term.clone()],
            };
            rest = &rest - &(&step * divisor);
            quotient.push(term);
        }
        Some(Self::from_terms(quotient))
    }

    /// The product of several dimensions; 1 for none.
    pub fn product<'a>(dims: impl IntoIterator<Item = &'a Self>) -> Self {
        dims.into_iter().fold(Self::known(1), |acc, d| &acc * d)
    }
}

impl From<usize> for Dim {
    fn from(n: usize) -> Self {
        Self::known(n)
    }
}

impl From<&str> for Dim {
    fn from(name: &str) -> Self {
        Self::symbol(name)
    }
}

impl From<&Dim> for Dim {
    fn from(dim: &Dim) -> Self {
        dim.clone()
    }
}

impl Add for &Dim {
    type Output = Dim;
    fn add(self, other: &Dim) -> Dim {
        Dim::from_terms(self.terms.iter().chain(&other.terms).cloned().collect())
    }
}

impl Sub for &Dim {
    type Output = Dim;
    fn sub(self, other: &Dim) -> Dim {
        self + &(&Dim::constant(-1) * other)
    }
}

impl Mul for &Dim {
    type Output = Dim;
    fn mul(self, other: &Dim) -> Dim {
        let mut terms = Vec::with_capacity(self.terms.len() * other.terms.len());
        for a in &self.terms {
            for b in &other.terms {
                terms.push(Term {
                    monomial: a.monomial.times(&b.monomial),
                    factor: a.factor * b.factor,
                });
            }
        }
        Dim::from_terms(terms)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.terms.is_empty() {
            return f.write_str("0");
        }
        for (i, term) in self.terms.iter().enumerate() {
            let sign = match (term.factor < 0, i) {
                (true, _) => "-",
                (false, 0) => "",
                (false, _) => "+",
            };
            f.write_str(sign)?;
            let factor = term.factor.unsigned_abs();
            let names = term.monomial.0.join("*");
            match (factor, names.is_empty()) {
                (_, true) => write!(f, "{factor}")?,
                (1, false) => write!(f, "{names}")?,
                (_, false) => write!(f, "{factor}*{names}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equal_polynomials_are_equal() {
        let (b, p, s) = (
            Dim::symbol("batch"),
            Dim::symbol("past"),
            Dim::symbol("seq"),
        );
        assert_eq!(&(&p + &s) * &b, &(&b * &p) + &(&s * &b));
        assert_eq!(&(&p + &s) - &s, p);
        assert_ne!(&p + &s, &p + &b);
    }

    #[test]
    fn exact_division_inverts_products() {
        let (b, p, s) = (
            Dim::symbol("batch"),
            Dim::symbol("past"),
            Dim::symbol("seq"),
        );
        let total = &p + &s;
        let all = Dim::product([&b, &Dim::known(9), &s, &total]);
        let others = Dim::product([&b, &Dim::known(3), &total]);
        assert_eq!(all.exact_div(&others), Some(&Dim::known(3) * &s));
        assert_eq!(all.exact_div(&p), None);
        assert_eq!(Dim::known(6).exact_div(&Dim::known(4)), None);
    }

    #[test]
    fn display_reads_as_written() {
        let total = &Dim::symbol("past") + &Dim::symbol("seq");
        assert_eq!(total.to_string(), "past+seq");
        assert_eq!((&Dim::known(3) * &Dim::symbol("seq")).to_string(), "3*seq");
        assert_eq!((&Dim::symbol("seq") - &Dim::known(2)).to_string(), "-2+seq");
        assert_eq!(Dim::known(0).to_string(), "0");
    }

    #[test]
    fn the_first_term_splits_off() {
        let past = Dim::symbol("past");
        let one = Dim::known(1);
        assert_eq!((&past + &one).split_term(), Some((one, past.clone())));
        assert_eq!(past.split_term(), None);
        assert_eq!(Dim::known(3).split_term(), None);
    }

    /// Any polynomial of two terms over three symbols.
    fn polynomial() -> impl Strategy<Value = Dim> {
        let term =
            (-3i64..4, proptest::collection::vec(0usize..3, 0..3)).prop_map(|(n, symbols)| {
                let symbols: Vec<Dim> = symbols
                    .into_iter()
                    .map(|s| Dim::symbol(["batch", "past", "seq"][s]))
                    .collect();
                &Dim::constant(n) * &Dim::product(&symbols)
            });
        (term.clone(), term).prop_map(|(a, b)| &a + &b)
    }

    proptest! {
        #[test]
        fn arithmetic_is_that_of_polynomials(
            a in polynomial(), b in polynomial(), c in polynomial(),
        ) {
            prop_assert_eq!(&(&a + &b) * &c, &(&a * &c) + &(&b * &c));
            prop_assert_eq!(&(&a - &b) + &b, a.clone());
            if let Some((first, rest)) = a.split_term() {
                prop_assert_eq!(&first + &rest, a);
            }
        }

        #[test]
        fn division_undoes_multiplication(a in polynomial(), b in polynomial()) {
            prop_assume!(b != Dim::known(0));
            prop_assert_eq!((&a * &b).exact_div(&b), Some(a));
        }
    }
}
