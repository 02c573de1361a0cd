//! Which bytes of a file have been copied.

use std::collections::BTreeMap;

use super::source::RangeSource;
use crate::error::Result;
use crate::units::FileOffset;
use crate::vfile::{VirtualFile, readable};

/// Disjoint, merged ranges of bytes.
#[derive(Clone, Debug, Default)]
pub(super) struct Ranges {
    /// Start to end.
    by_start: BTreeMap<u64, u64>,
}

impl Ranges {
    pub(super) fn insert(&mut self, mut start: u64, mut end: u64) {
        let touching: Vec<_> = self
            .by_start
            .range(..=end)
            .rev()
            .take_while(|&(_, &e)| e >= start)
            .map(|(&s, &e)| (s, e))
            .collect();
        for (s, e) in touching {
            self.by_start.remove(&s);
            (start, end) = (start.min(s), end.max(e));
        }
        self.by_start.insert(start, end);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.by_start.iter().map(|(&s, &e)| (s, e))
    }

    /// Reads what was copied, of a file of `file_size` bytes; zeros where nothing was.
    pub(super) fn read(
        &self,
        source: &dyn VirtualFile,
        file_size: u64,
        at: FileOffset,
        length: usize,
    ) -> Result<Vec<u8>> {
        let mut bytes = vec![0; readable(file_size, at, length)];
        let (first, last) = (at.bytes(), at.bytes() + bytes.len() as u64);
        for (start, end) in self.iter().map(|(s, e)| (s.max(first), e.min(last))).filter(|(s, e)| s < e) {
            let piece = &mut bytes[(start - first) as usize..(end - first) as usize];
            source.read_at(FileOffset(start), piece)?;
        }
        Ok(bytes)
    }

    /// Whether the ranges, in a file of `file_size` bytes, are the whole of `source`: what they leave out must
    /// be holes there, as cp leaves them out of sparse files and then sets the size.
    pub(super) fn cover(&self, source: &RangeSource, file_size: u64) -> Result<bool> {
        let whole = source.whole_size();
        if file_size != whole && file_size != source.shown_size {
            return Ok(false);
        }
        let mut at = 0;
        for (start, end) in self.iter().chain([(whole, whole)]) {
            while at < start.min(whole) {
                let extent = source.file.extent_at(FileOffset(at))?;
                if extent.kind.is_data() {
                    return Ok(false);
                }
                at += extent.length;
            }
            at = at.max(end);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_agree_with_a_vector_of_booleans(inserts in prop::collection::vec((0u64..200, 1u64..50), 0..30)) {
            let mut plain = vec![false; 300];
            let mut ranges = Ranges::default();
            for (start, length) in inserts {
                ranges.insert(start, start + length);
                plain[start as usize..(start + length) as usize].fill(true);
            }
            let mut covered = vec![false; 300];
            let mut last = None;
            for (start, end) in ranges.iter() {
                prop_assert!(last.is_none_or(|l| l < start), "not merged");
                covered[start as usize..end as usize].fill(true);
                last = Some(end);
            }
            prop_assert_eq!(covered, plain);
        }
    }
}
