//! The bytes of a file that were read and that a part may still need.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Bytes of a file without a gap, as the pieces in which they were read.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Where the first piece begins.
    start: u64,
    pieces: VecDeque<Bytes>,
}

impl Held {
    /// Nothing, at a place of the file.
    pub(super) fn at(start: u64) -> Self {
        Self { start, pieces: VecDeque::new() }
    }

    /// Whether there is nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Adds what was read at `at`, as far as it comes after what there is.
    pub(super) fn push(&mut self, at: u64, piece: &Bytes) {
        let end = self.start + self.pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
        let known = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX).min(piece.len());
        if known < piece.len() {
            self.pieces.push_back(piece.slice(known..));
        }
    }

    /// Nothing before this place is needed any more.
    pub(super) fn drop_before(&mut self, place: u64) {
        while let Some(first) = self.pieces.front_mut() {
            let length = first.len() as u64;
            if self.start + length > place {
                let unneeded = place.saturating_sub(self.start);
                *first = first.slice(unneeded as usize..);
                self.start += unneeded;
                return;
            }
            self.start += length;
            self.pieces.pop_front();
        }
    }

    /// The bytes of a range: those of one piece are shared, those of several are put together. `None` when they are not all
    /// held.
    pub(super) fn range(&self, at: u64, length: u64) -> Option<Bytes> {
        if length == 0 {
            return Some(Bytes::new());
        }
        let (mut skipped, mut left) = (at.checked_sub(self.start)?, usize::try_from(length).ok()?);
        let mut joined = BytesMut::new();
        for piece in &self.pieces {
            if skipped >= piece.len() as u64 {
                skipped -= piece.len() as u64;
                continue;
            }
            let from = skipped as usize;
            let taken = left.min(piece.len() - from);
            if joined.is_empty() && taken == left {
                return Some(piece.slice(from..from + taken));
            }
            joined.reserve(left);
            joined.extend_from_slice(&piece[from..from + taken]);
            (skipped, left) = (0, left - taken);
            if left == 0 {
                break;
            }
        }
        (left == 0).then(|| joined.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_what_was_read_there_whatever_the_pieces_were() {
        let file: Vec<u8> = (0..200).collect();
        for piece in [1, 3, 7, 64, 200] {
            let mut held = Held::at(10);
            for (number, bytes) in file.chunks(piece).enumerate() {
                held.push((number * piece) as u64, &Bytes::copy_from_slice(bytes));
            }
            for dropped in [10, 11, 50, 130] {
                held.drop_before(dropped);
                for (at, length) in [(130, 0), (130, 1), (131, 7), (130, 70), (199, 1)] {
                    let wanted = &file[at..at + length];
                    assert_eq!(
                        held.range(at as u64, length as u64).unwrap(),
                        wanted,
                        "{piece} {at} {length}"
                    );
                }
                assert_eq!(held.range(dropped - 1, 1), None);
                assert_eq!(held.range(199, 2), None);
            }
        }
        let mut held = Held::at(0);
        held.push(0, &Bytes::from_static(b"abc"));
        held.drop_before(3);
        assert!(held.is_empty() && held.range(3, 1).is_none());
        held.push(3, &Bytes::from_static(b"def"));
        assert_eq!(held.range(4, 2).unwrap(), "ef");
    }
}
