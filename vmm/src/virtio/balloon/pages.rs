//! Page numbers as the driver lists them, made into ranges.

/// The balloon's page, whatever the guest's own is.
pub(super) const PAGE: u64 = 4096;

/// Neighbouring pages of a list, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) gpa: u64,
    pub(super) len: u64,
}

/// The pages of a list of little-endian page numbers, in its order; neighbours that follow each other, up or down, are
/// one range. Bytes at the end that are no whole number are left out.
pub(super) fn runs(list: &[u8]) -> impl Iterator<Item = Run> + '_ {
    let mut pages = list
        .as_chunks()
        .0
        .iter()
        .map(|bytes| u64::from(u32::from_le_bytes(*bytes)))
        .peekable();
    std::iter::from_fn(move || {
        let mut first = pages.next()?;
        let mut end = first + 1;
        while let Some(page) = pages.next_if(|page| *page == end || page + 1 == first) {
            first = first.min(page);
            end = end.max(page + 1);
        }
        Some(Run {
            gpa: first * PAGE,
            len: (end - first) * PAGE,
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(pages: &[u32]) -> Vec<u8> {
        pages.iter().flat_map(|page| page.to_le_bytes()).collect()
    }

    fn run(page: u64, pages: u64) -> Run {
        Run {
            gpa: page * PAGE,
            len: pages * PAGE,
        }
    }

    #[test]
    fn neighbours_are_one_run() {
        let of = |pages: &[u32]| runs(&list(pages)).collect::<Vec<_>>();
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[7]), [run(7, 1)]);
        assert_eq!(of(&[7, 8, 9, 3]), [run(7, 3), run(3, 1)]);
        assert_eq!(of(&[9, 8, 7, 6]), [run(6, 4)]);
        assert_eq!(of(&[5, 5]), [run(5, 1), run(5, 1)]);
        assert_eq!(of(&[u32::MAX, 0]), [run(0xffff_ffff, 1), run(0, 1)]);
        let mut ragged = list(&[1, 2]);
        ragged.extend([1, 2, 3]);
        assert_eq!(runs(&ragged).collect::<Vec<_>>(), [run(1, 2)]);
    }

    proptest! {
        /// No page is lost, none is added.
        #[test]
        fn runs_are_the_pages(pages in prop::collection::vec(0u32..40, 0..60)) {
            let mut back: Vec<_> = runs(&list(&pages))
                .flat_map(|run| (run.gpa / PAGE)..((run.gpa + run.len) / PAGE))
                .collect();
            back.sort_unstable();
            let mut pages: Vec<_> = pages.into_iter().map(u64::from).collect();
            pages.sort_unstable();
            prop_assert_eq!(back, pages);
        }
    }
}
