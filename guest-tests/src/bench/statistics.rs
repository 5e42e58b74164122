//! Least, middle and greatest of a few samples. Means would be led astray by a busy machine's outliers.

use serde::Serialize;

/// Summary of samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The least.
    pub min: f64,
    /// The middle one.
    pub median: f64,
    /// The greatest.
    pub max: f64,
}

/// A count as a figure for people: beyond 2^53 its last digits go, and no measurement has them.
#[expect(clippy::cast_precision_loss)]
pub fn figure(count: u64) -> f64 {
    count as f64
}

impl Summary {
    /// Of at least one sample.
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut samples: Vec<f64> = samples.into_iter().collect();
        samples.sort_by(f64::total_cmp);
        let (min, max) = (*samples.first()?, *samples.last()?);
        let middle = samples.len() / 2;
        let median = if samples.len() % 2 == 1 {
            samples[middle]
        } else {
            f64::midpoint(samples[middle - 1], samples[middle])
        };
        Some(Self { min, median, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(
            Summary::of([3.0, 1.0, 9.0]),
            Some(Summary {
                min: 1.0,
                median: 3.0,
                max: 9.0
            })
        );
        assert_eq!(
            Summary::of([4.0, 2.0]).unwrap().median.to_bits(),
            3.0_f64.to_bits()
        );
        assert_eq!(Summary::of([]), None);
    }
}
