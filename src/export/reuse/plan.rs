//! Which parts an object is made of: sent, copied by the store from the old object or from zeros, or both in one.
//!
//! The planner sees the new file's chunks in order and keeps three pieces that follow each other, of which any may be
//! empty. From them parts are made at the front:
//!
//! | piece | what | held in memory |
//! |---|---|---|
//! | before | a run long enough to be copied | no |
//! | sent | bytes that are in no such run | yes |
//! | run | a run that is too short so far | yes |
//!
//! A run is a series of chunks that stand behind each other in the old object, or of zeros. When `run` becomes long
//! enough, what is before it is settled, and it becomes `before`; when it ends earlier, it is sent. Sent bytes that are too
//! few for a part join the end of what is copied before them (a splice), or the beginning of what is copied after them.

use std::collections::VecDeque;
use std::sync::Arc;

use super::chunker::{ChunkSizes, Cut};
use super::crc64;
use super::index::ChunkIndex;
use crate::units::GIB;

/// What a store asks of parts.
#[derive(Clone, Debug)]
pub(in crate::export) struct PlanLimits {
    /// Fewest bytes of a part but the last: 5 MiB at S3.
    pub(in crate::export) least: u64,
    /// Bytes of a part that is sent.
    pub(in crate::export) part_size: u64,
    /// Most bytes of a part that is copied, unless parts must be so long that chunks cannot be put together to such ones.
    pub(in crate::export) longest_copy: u64,
    /// Most parts.
    pub(in crate::export) max_parts: usize,
    /// Whether parts can be made of a copied range and sent bytes.
    pub(in crate::export) splices: bool,
    /// Bytes of the object of zeros, if there is one.
    pub(in crate::export) zeros: Option<u64>,
}

/// Where copied bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::export) enum Origin {
    /// The old object, from here on.
    Old {
        /// The first byte.
        at: u64,
    },
    /// The object of zeros, from its start.
    Zeros,
}

/// How a part is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::export) enum Making {
    /// Its bytes are sent.
    Send,
    /// All of it is copied.
    Copy(Origin),
    /// Its first bytes are copied, the others sent.
    Splice {
        /// Bytes that are copied; as many as any part but the last has.
        kept: u64,
        /// From where.
        from: Origin,
    },
}

/// A part of the new object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::export) struct PlannedPart {
    /// Its number, from 0.
    pub(in crate::export) index: usize,
    /// Where it begins in the file.
    pub(in crate::export) offset: u64,
    /// Its bytes.
    pub(in crate::export) length: u64,
    /// How it is made.
    pub(in crate::export) making: Making,
    /// CRC-64/NVME of the bytes that are copied.
    pub(in crate::export) crc64: u64,
}

/// Most bytes of a part (S3 User Guide, "Amazon S3 multipart upload limits").
const LONGEST_PART: u64 = 5 * GIB;

/// A chunk's length and CRC-64/NVME.
type Chunk = (u64, u64);

/// Chunks that stand behind each other in the same place.
#[derive(Debug)]
struct Run {
    origin: Origin,
    chunks: VecDeque<Chunk>,
    length: u64,
}

impl Run {
    fn new(origin: Origin) -> Self {
        Self { origin, chunks: VecDeque::new(), length: 0 }
    }

    /// What stands behind it there.
    fn next(&self) -> Origin {
        after(self.origin, self.length)
    }

    fn push(&mut self, chunk: Chunk) {
        self.length += chunk.0;
        self.chunks.push_back(chunk);
    }

    /// Takes the chunks off the front that have at most so many bytes together; their number of bytes and CRC.
    fn take(&mut self, most: u64) -> Chunk {
        let mut taken = (0, 0);
        while let Some(&chunk) = self.chunks.front().filter(|chunk| taken.0 + chunk.0 <= most) {
            self.chunks.pop_front();
            let crc64 = crc64::joined(taken.1, chunk.1, chunk.0);
            taken = (taken.0 + chunk.0, crc64);
        }
        self.origin = after(self.origin, taken.0);
        self.length -= taken.0;
        taken
    }

    /// How many bytes are before its shortest end of whole chunks that has at least so many.
    fn before_end_of(&self, least: u64) -> u64 {
        let mut end = 0;
        let mut chunks = self.chunks.iter().rev();
        while end < least
            && let Some(chunk) = chunks.next()
        {
            end += chunk.0;
        }
        self.length - end
    }
}

fn after(origin: Origin, bytes: u64) -> Origin {
    match origin {
        Origin::Old { at } => Origin::Old { at: at + bytes },
        Origin::Zeros => Origin::Zeros,
    }
}

/// Plans the parts of one object while its file is cut.
#[derive(Debug)]
pub(in crate::export) struct Planner {
    limits: PlanLimits,
    size_bound: u64,
    old: Option<Arc<ChunkIndex>>,
    /// Number and place of the next part.
    index: usize,
    offset: u64,
    before: Option<Run>,
    sent: u64,
    run: Option<Run>,
    /// Where the end of what was added would be in the old object if the last long run went on.
    expected: Option<u64>,
}

impl Planner {
    /// A planner of the parts from number `start.0` on, which begins at byte `start.1` of the file. The file has at most
    /// `size_bound` bytes.
    pub(in crate::export) fn new(
        limits: PlanLimits,
        size_bound: u64,
        start: (usize, u64),
        old: Option<Arc<ChunkIndex>>,
    ) -> Self {
        let (index, offset) = start;
        let expected = old.is_some().then_some(offset);
        let mut planner =
            Self { limits, size_bound, old, index, offset, before: None, sent: 0, run: None, expected };
        let chunk = planner.old.as_ref().map_or(0, |old| ChunkSizes::with_average(old.average()).max);
        let needed = planner.shortest_long(u64::from(chunk)).min(LONGEST_PART);
        planner.limits.longest_copy = planner.limits.longest_copy.max(needed);
        planner
    }

    /// The file before this byte is in planned parts or will be copied: nobody needs to keep it.
    pub(in crate::export) fn held_from(&self) -> u64 {
        self.offset + length(&self.before)
    }

    /// Takes the file's next chunk, and adds the parts that are certain now.
    pub(in crate::export) fn add(&mut self, cut: &Cut, parts: &mut Vec<PlannedPart>) {
        let chunk = (u64::from(cut.length), cut.crc64);
        let origin = self.origin(cut);
        self.expected = self.expected.and_then(|at| at.checked_add(chunk.0));
        let Some(origin) = origin else {
            self.end_run(parts);
            self.sent += chunk.0;
            return self.cut_off_sent(parts);
        };
        if self.sent == 0
            && self.run.is_none()
            && let Some(before) = self.before.as_mut().filter(|before| before.next() == origin)
        {
            before.push(chunk);
            return self.cut_off_copies(parts);
        }
        if self.run.as_ref().is_none_or(|run| run.next() != origin) {
            self.end_run(parts);
        }
        let run = self.run.get_or_insert_with(|| Run::new(origin));
        run.push(chunk);
        if run.length >= self.least() {
            self.settle(parts);
        }
    }

    /// The file has ended: the other parts.
    pub(in crate::export) fn finish(&mut self, parts: &mut Vec<PlannedPart>) {
        if self.run.is_some() && self.sent > 0 && self.sent < self.least() {
            if self.can_splice() {
                self.splice(parts);
            } else {
                self.fill_up_sent();
            }
        }
        if let Some(run) = self.run.take() {
            self.copy_before(parts);
            self.send_all(parts);
            self.before = Some(run);
        }
        self.copy_before(parts);
        while self.sent > self.part_size() {
            self.send(self.part_size(), parts);
        }
        self.send_all(parts);
    }

    /// Fewest bytes of the next part: the store's limit, and as many as keep the number of parts within its limit.
    fn least(&self) -> u64 {
        let left = self.limits.max_parts.saturating_sub(self.index).max(1) as u64;
        self.limits.least.max(self.size_bound.saturating_sub(self.offset).div_ceil(left)).max(1)
    }

    /// How long copied parts may have to be so that all but the last one can end with chunks of up to so many bytes and be
    /// neither longer than this nor shorter than the shortest one.
    fn shortest_long(&self, chunk: u64) -> u64 {
        2 * (self.least() + chunk)
    }

    /// Most bytes of a copied part.
    fn longest(&self, origin: Origin) -> u64 {
        match origin {
            Origin::Old { .. } => self.limits.longest_copy,
            Origin::Zeros => self.limits.longest_copy.min(self.limits.zeros.unwrap_or(0)),
        }
    }

    /// Where the store has this chunk.
    fn origin(&self, cut: &Cut) -> Option<Origin> {
        let old = self.old.as_ref();
        let find = |expected| old?.offset_of(&cut.digest, cut.length, expected);
        let needed = self.shortest_long(cut.length.into());
        let is_copied = |origin: &Origin| self.longest(*origin) >= needed;
        let zeros = Some(Origin::Zeros).filter(|_| cut.is_zero).filter(is_copied);
        if zeros.is_some() && self.current().is_some_and(|run| run.origin == Origin::Zeros) {
            return zeros;
        }
        let mut found = None;
        for expected in self.wanted() {
            found = find(expected);
            if found.is_some() && found == expected {
                return Some(Origin::Old { at: expected? }).filter(is_copied);
            }
        }
        zeros.or_else(|| found.map(|at| Origin::Old { at }).filter(is_copied))
    }

    /// Where the next chunk of the old object is looked for first: behind the run, and where the last long run would be
    /// now.
    fn wanted(&self) -> [Option<u64>; 2] {
        let next = self.run.as_ref().and_then(|run| match run.next() {
            Origin::Old { at } => Some(at),
            Origin::Zeros => None,
        });
        [next, self.expected]
    }

    /// The run that the next chunk may be one of.
    fn current(&self) -> Option<&Run> {
        self.run.as_ref().or_else(|| self.before.as_ref().filter(|_| self.sent == 0))
    }

    /// The run does not go on: it was too short.
    fn end_run(&mut self, parts: &mut Vec<PlannedPart>) {
        if let Some(run) = self.run.take() {
            self.sent += run.length;
            self.cut_off_sent(parts);
        }
    }

    /// The run is long enough: makes parts of what stands before it.
    fn settle(&mut self, parts: &mut Vec<PlannedPart>) {
        let Some(run) = self.run.take() else { return };
        if self.sent >= self.least() || self.sent == 0 {
            self.copy_before(parts);
            self.send_all(parts);
        } else if self.can_splice() {
            self.splice(parts);
        } else {
            self.copy_before(parts);
            self.run = Some(run);
            return self.fill_up_sent();
        }
        if let Origin::Old { at } = run.next() {
            self.expected = Some(at);
        }
        self.before = Some(run);
    }

    fn can_splice(&self) -> bool {
        self.limits.splices && self.before.is_some()
    }

    /// Sent bytes that are too few for a part take as many from the run after them as they need.
    fn fill_up_sent(&mut self) {
        let least = self.least();
        while self.sent < least
            && let Some((length, _)) = self.run.as_mut().and_then(|run| {
                let first = run.chunks.front()?.0;
                Some(run.take(first))
            })
        {
            self.sent += length;
        }
        self.run.take_if(|run| run.chunks.is_empty());
    }

    /// Parts of sent bytes, as long as enough stays for another one.
    fn cut_off_sent(&mut self, parts: &mut Vec<PlannedPart>) {
        if self.sent >= self.least() {
            self.copy_before(parts);
        }
        loop {
            let (least, part_size) = (self.least(), self.part_size());
            if self.sent < part_size + least {
                return;
            }
            self.send(part_size, parts);
        }
    }

    fn part_size(&self) -> u64 {
        self.limits.part_size.max(self.least())
    }

    /// Parts of the beginning of a long run, as long as enough stays for a splice.
    fn cut_off_copies(&mut self, parts: &mut Vec<PlannedPart>) {
        while let Some(longest) = self.before.as_ref().map(|before| self.longest(before.origin))
            && length(&self.before) >= longest + longest / 2
        {
            self.copy(longest, parts);
        }
    }

    /// Parts of all of `before`.
    fn copy_before(&mut self, parts: &mut Vec<PlannedPart>) {
        self.copy_first(length(&self.before), parts);
        self.before = None;
    }

    /// Parts of the first `bytes` of `before`, which end with a chunk.
    fn copy_first(&mut self, mut bytes: u64, parts: &mut Vec<PlannedPart>) {
        while let Some(before) = self.before.as_ref().filter(|_| bytes > 0) {
            let (least, longest) = (self.least(), self.longest(before.origin));
            let most = if bytes <= longest { bytes } else { longest.min(bytes - least) };
            bytes -= self.copy(most, parts);
        }
    }

    /// The last bytes of `before` and all that is to be sent become one part.
    fn splice(&mut self, parts: &mut Vec<PlannedPart>) {
        let least = self.least();
        let ahead = self.before.as_ref().map_or(0, |before| before.before_end_of(least));
        self.copy_first(if ahead < least { 0 } else { ahead }, parts);
        let Some(mut before) = self.before.take() else { return };
        let from = before.origin;
        let (kept, crc64) = before.take(before.length);
        let length = kept + std::mem::take(&mut self.sent);
        self.part(length, Making::Splice { kept, from }, crc64, parts);
    }

    /// One part of at most so many bytes of `before`; returns its bytes.
    fn copy(&mut self, most: u64, parts: &mut Vec<PlannedPart>) -> u64 {
        let Some(before) = &mut self.before else { return 0 };
        let origin = before.origin;
        let (length, crc64) = before.take(most);
        self.part(length, Making::Copy(origin), crc64, parts);
        length
    }

    /// Parts of all that is to be sent.
    fn send_all(&mut self, parts: &mut Vec<PlannedPart>) {
        if self.sent > 0 {
            self.send(self.sent, parts);
        }
    }

    fn send(&mut self, bytes: u64, parts: &mut Vec<PlannedPart>) {
        self.sent -= bytes;
        self.part(bytes, Making::Send, 0, parts);
    }

    fn part(&mut self, length: u64, making: Making, crc64: u64, parts: &mut Vec<PlannedPart>) {
        parts.push(PlannedPart { index: self.index, offset: self.offset, length, making, crc64 });
        self.index += 1;
        self.offset += length;
    }
}

fn length(run: &Option<Run>) -> u64 {
    run.as_ref().map_or(0, |run| run.length)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use crc_fast::CrcAlgorithm;
    use proptest::prelude::*;

    use super::super::index::ChunkList;
    use super::*;

    /// Longest chunk in these tests.
    const CHUNK: u64 = 16;

    /// A chunk as a test names it: its content is made of the number, 0 are zeros.
    type Name = (u16, u32);

    fn name(number: u16) -> Name {
        (number, 2 + u32::from(number).wrapping_mul(2_654_435_761) % (CHUNK as u32 - 1))
    }

    fn content((number, length): Name) -> Vec<u8> {
        let bytes = number.to_le_bytes();
        (0..length as usize).map(|at| bytes[at % 2]).collect()
    }

    fn cut(chunk: Name) -> Cut {
        let bytes = content(chunk);
        let crc64 = crc_fast::checksum(CrcAlgorithm::Crc64Nvme, &bytes);
        Cut { length: chunk.1, digest: *blake3::hash(&bytes).as_bytes(), crc64, is_zero: chunk.0 == 0 }
    }

    fn index(chunks: &[Name]) -> Arc<ChunkIndex> {
        let cuts: Vec<_> = chunks.iter().map(|chunk| cut(*chunk)).collect();
        index_of(&cuts, ChunkSizes::with_average(CHUNK as u32 / 4))
    }

    fn index_of(cuts: &[Cut], sizes: ChunkSizes) -> Arc<ChunkIndex> {
        let mut list = ChunkList::default();
        list.extend(sizes.average, 0, &ChunkList::entries_of(cuts));
        Arc::new(ChunkIndex::decode(&list.encode("e").unwrap(), list.end(), "e").unwrap())
    }

    fn limits() -> PlanLimits {
        PlanLimits {
            least: 20,
            part_size: 32,
            longest_copy: 128,
            max_parts: 10_000,
            splices: true,
            zeros: Some(96),
        }
    }

    /// A plan that was carried out.
    struct Made {
        parts: Vec<PlannedPart>,
        /// Bytes that were sent.
        sent: u64,
    }

    /// Plans the parts of `new`, makes them of `old` and what a transfer holds, and checks each rule.
    fn made(old: &[Name], new: &[Name], limits: &PlanLimits, bound: u64, start: (usize, u64)) -> Made {
        let bytes = |chunks: &[Name]| chunks.iter().flat_map(|chunk| content(*chunk)).collect::<Vec<u8>>();
        let (old_bytes, new_bytes) = (bytes(old), bytes(new));
        let mut planner = Planner::new(limits.clone(), bound + start.1, start, Some(index(old)));
        let longest_copy = limits.longest_copy.max(2 * (planner.least() + CHUNK));
        let (mut parts, mut sent, mut result) = (Vec::new(), 0, Vec::new());
        let (mut index, mut held, mut fed, mut last) = (start.0, start.1, start.1, u64::MAX);
        let cuts: Vec<_> = new.iter().map(|chunk| Some(cut(*chunk))).chain([None]).collect();
        let mut all = Vec::new();
        for cut in &cuts {
            let least = planner.least();
            match cut {
                Some(cut) => planner.add(cut, &mut parts),
                None => planner.finish(&mut parts),
            }
            fed += cut.as_ref().map_or(0, |cut| u64::from(cut.length));
            for part in &parts {
                let offset = start.1 + result.len() as u64;
                assert_eq!((part.index, part.offset), (index, offset), "parts follow each other");
                assert!(last >= limits.least, "a part of {last} bytes that is not the last");
                let (from, copied) = match part.making {
                    Making::Send => (Origin::Zeros, 0),
                    Making::Copy(from) => (from, part.length),
                    Making::Splice { kept, from } => (from, kept),
                };
                assert!(copied <= longest_copy);
                let is_splice = matches!(part.making, Making::Splice { .. });
                assert!(
                    !is_splice || (limits.splices && copied >= limits.least && copied < part.length),
                    "{part:?}"
                );
                let copy = match from {
                    Origin::Old { at } => old_bytes[at as usize..(at + copied) as usize].to_vec(),
                    Origin::Zeros => vec![0; copied as usize],
                };
                assert!(from != Origin::Zeros || copied <= limits.zeros.unwrap_or(0));
                assert_eq!(crc_fast::checksum(CrcAlgorithm::Crc64Nvme, &copy), part.crc64, "{part:?}");
                result.extend(copy);
                let here = start.1 + result.len() as u64;
                assert!(copied == part.length || here >= held, "{part:?} needs bytes that nobody holds");
                let rest = part.length - copied;
                result.extend(&new_bytes[(here - start.1) as usize..][..rest as usize]);
                sent += rest;
                (index, last) = (index + 1, part.length);
            }
            all.append(&mut parts);
            assert!(planner.held_from() >= held, "what was given up is wanted again");
            held = planner.held_from();
            let most = limits.part_size.max(least) + 2 * least + 2 * CHUNK;
            assert!(fed - held <= most, "{} bytes are held", fed - held);
        }
        assert_eq!(result, new_bytes);
        assert!(index <= limits.max_parts, "{index} parts instead of {}", limits.max_parts);
        Made { parts: all, sent }
    }

    fn length_of(chunks: &[Name]) -> u64 {
        chunks.iter().map(|chunk| u64::from(chunk.1)).sum()
    }

    /// Different chunks, with zeros of different lengths between them.
    fn chunks(most: usize) -> impl Strategy<Value = Vec<Name>> {
        let chunk = prop_oneof![
            6 => (1..300u16).prop_map(name),
            1 => (1..=CHUNK as u32).prop_map(|length| (0, length)),
            1 => Just((0, CHUNK as u32)),
        ];
        let series = prop_oneof![
            3 => proptest::collection::vec(chunk, 0..12),
            2 => (1..300u16, 1..60u16).prop_map(|(from, count)| (from..from + count).map(name).collect()),
            1 => (1..40usize).prop_map(|count| vec![(0, CHUNK as u32); count]),
        ];
        proptest::collection::vec(series, 0..most).prop_map(|series| series.concat())
    }

    /// A list of chunks, and another one that was made of it by replacing some of them.
    fn versions() -> impl Strategy<Value = (Vec<Name>, Vec<Name>)> {
        let change = (any::<prop::sample::Index>(), 0..6usize, chunks(2));
        (chunks(12), proptest::collection::vec(change, 0..8)).prop_map(|(old, changes)| {
            let mut new = old.clone();
            for (at, count, instead) in changes {
                let at = at.index(new.len() + 1);
                new.splice(at..(at + count).min(new.len()), instead);
            }
            (old, new)
        })
    }

    fn any_limits() -> impl Strategy<Value = PlanLimits> {
        (1..40u64, 0..60u64, 0..200u64, any::<bool>(), proptest::option::of(1..300u64)).prop_map(
            |(least, more, longest, splices, zeros)| PlanLimits {
                least,
                part_size: least + more,
                longest_copy: longest,
                splices,
                zeros,
                ..limits()
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn what_a_plan_makes_is_the_new_file_within_all_limits(
            (old, new) in versions(),
            limits in any_limits(),
            parts in 1..40usize,
            more in 0..500u64,
            start in (0..20usize, 0..1000u64),
        ) {
            let bound = length_of(&new) + more;
            made(&old, &new, &limits, bound, (0, 0));
            made(&old, &new, &PlanLimits { max_parts: start.0 + parts, ..limits }, bound, start);
        }

        #[test]
        fn isolated_changes_cost_what_has_changed(
            places in proptest::collection::btree_set(1..20usize, 1..8),
            inserted in any::<bool>(),
        ) {
            let old: Vec<_> = (1..400).map(name).collect();
            let mut new = old.clone();
            let mut changed = 0;
            for place in places {
                let with = name(2000 + place as u16);
                changed += u64::from(with.1);
                new.splice(place * 20..place * 20 + usize::from(!inserted), [with]);
            }
            let made = made(&old, &new, &limits(), length_of(&new), (0, 0));
            prop_assert!(made.sent == changed, "{} instead of {changed} bytes were sent", made.sent);
        }
    }

    #[test]
    fn a_file_of_which_nothing_is_there_is_sent_in_parts_of_one_size() {
        for count in 1..60 {
            let new: Vec<_> = (1..count).map(name).collect();
            let size = length_of(&new);
            let parts = made(&[], &new, &limits(), size, (0, 0)).parts;
            for part in &parts {
                let expected = 32.min(size - 32 * part.index as u64);
                assert_eq!((part.offset, part.length), (32 * part.index as u64, expected), "{size} bytes");
            }
        }
    }

    #[test]
    fn what_has_not_changed_is_not_sent_and_takes_few_parts() {
        let old: Vec<_> = (1..2000).map(name).collect();
        let made = made(&old, &old, &limits(), length_of(&old), (0, 0));
        assert_eq!(made.sent, 0);
        let most = length_of(&old) / (128 - CHUNK) + 2;
        assert!(made.parts.len() as u64 <= most, "{} parts instead of {most}", made.parts.len());
    }

    #[test]
    fn a_change_at_the_beginning_takes_what_follows_until_it_is_a_part() {
        let old: Vec<_> = (1..200).map(name).collect();
        let new = [&[name(500)], &old[1..]].concat();
        for splices in [true, false] {
            let sent = made(&old, &new, &PlanLimits { splices, ..limits() }, length_of(&new), (0, 0)).sent;
            assert!((20..20 + CHUNK).contains(&sent), "{sent} bytes were sent");
        }
    }

    #[test]
    fn without_splices_a_change_costs_a_part() {
        let old: Vec<_> = (1..500).map(name).collect();
        let mut new = old.clone();
        for place in [100, 200, 300] {
            new[place] = name(500 + place as u16);
        }
        let made = made(&old, &new, &PlanLimits { splices: false, ..limits() }, length_of(&new), (0, 0));
        assert!(made.sent < 3 * (20 + CHUNK), "{} bytes were sent", made.sent);
    }

    #[test]
    fn a_change_at_the_end_costs_itself() {
        let old: Vec<_> = (1..500).map(name).collect();
        for from_end in [1, 2, 3] {
            let mut new = old.clone();
            let place = new.len() - from_end;
            new[place] = name(999);
            let made = made(&old, &new, &limits(), length_of(&new), (0, 0));
            assert_eq!(made.sent, u64::from(name(999).1), "{from_end} from the end");
        }
    }

    #[test]
    fn a_long_change_costs_itself() {
        let old: Vec<_> = (1..200).map(name).collect();
        for count in 1..40 {
            let changed: Vec<_> = (1000..1000 + count).map(name).collect();
            let new = [&old[..100], &changed, &old[100..]].concat();
            let made = made(&old, &new, &limits(), length_of(&new), (0, 0));
            assert_eq!(made.sent, length_of(&changed), "{count} chunks");
        }
    }

    #[test]
    fn what_was_moved_is_found_and_zeros_are_not_sent() {
        let (one, two): (Vec<_>, Vec<_>) = ((1..100).map(name).collect(), (100..200).map(name).collect());
        let zeros = vec![(0, CHUNK as u32); 50];
        let new = [&two[..], &zeros, &one, &zeros].concat();
        let made = made(&[&one[..], &two].concat(), &new, &limits(), length_of(&new), (0, 0));
        assert_eq!(made.sent, 0);
        let mut bytes = HashMap::new();
        for part in made.parts {
            *bytes.entry(part.making == Making::Copy(Origin::Zeros)).or_insert(0) += part.length;
        }
        assert_eq!(bytes[&true], 2 * length_of(&zeros));
    }

    #[test]
    fn the_largest_objects_keep_within_the_number_of_parts() {
        let limits = PlanLimits {
            least: 5 << 20,
            part_size: 5 << 30,
            longest_copy: 5 << 30,
            zeros: Some(64 << 20),
            ..limits()
        };
        // Files of which nothing can be copied within the limits, and of which all but each fortieth chunk is.
        for (size, length, max_parts) in [(48u64 << 40, 1 << 30, 10_000), (2 << 40, 64 << 20, 1000)] {
            let old = Cut { length, is_zero: false, ..cut(name(1)) };
            let cuts = vec![Cut { length: 64 << 20, ..old.clone() }; 1000];
            let old_index = index_of(&cuts, ChunkSizes::for_file(size));
            let limits = PlanLimits { max_parts, ..limits.clone() };
            let mut planner = Planner::new(limits, size, (0, 0), Some(old_index));
            let (mut parts, new) = (Vec::new(), Cut { length, ..cut(name(2)) });
            for number in 0..size / u64::from(length) {
                planner.add(if number % 40 == 0 { &new } else { &old }, &mut parts);
            }
            planner.finish(&mut parts);
            assert_eq!(parts.iter().map(|part| part.length).sum::<u64>(), size);
            assert!(parts.len() <= max_parts, "{} parts", parts.len());
            assert!(parts.iter().all(|part| part.length <= 11 << 30), "a part is too long");
            let sent = parts.iter().map(|part| match part.making {
                Making::Send => part.length,
                Making::Copy(_) => 0,
                Making::Splice { kept, .. } => part.length - kept,
            });
            let expected = if size > 4 << 40 { size } else { size / 40 };
            assert!(sent.sum::<u64>() < expected + (6 << 30), "too much of {size} bytes is sent");
        }
    }
}
