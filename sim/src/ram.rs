//! Sparse memory. A page comes to be when it is first written; until then it reads as zero.
//!
//! Each page has two contents: what the CPUs see through their caches, and what is at the point of
//! coherency (PoC), which an observer with its caches off, or a guest that starts with its MMU off, reads
//! (Arm ARM B2.7). They differ while the page is dirty.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::Region;

/// Bytes in a page: the only granule of this machine.
pub(crate) const PAGE: u64 = 4096;
/// 64-bit words in a page.
pub(crate) const WORDS: usize = 512;

/// Rounds an address down to its page.
pub(crate) const fn page_of(pa: u64) -> u64 {
    pa & !(PAGE - 1)
}

/// Returns the index of the 64-bit word that an address is in, within its page.
pub(crate) const fn word_of(pa: u64) -> usize {
    ((pa & (PAGE - 1)) / 8) as usize
}

/// A map keyed by page address. The hash is a multiplication: fast, and the same in every run.
pub(crate) type PageMap<T> = HashMap<u64, T, BuildHasherDefault<PageHasher>>;

/// The hash of [`PageMap`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }
}

/// One page that has been written or maintained.
#[derive(Debug)]
struct Page {
    /// What CPUs see.
    cached: [u64; WORDS],
    /// What is at the PoC, when that differs: `Some` exactly while the page is dirty.
    at_poc: Option<Box<[u64; WORDS]>>,
    wipes: usize,
    cleans: usize,
    /// What [`Ram::changes`] was when something last happened to it.
    version: u64,
}

impl Page {
    const EMPTY: Self = Self { cached: [0; WORDS], at_poc: None, wipes: 0, cleans: 0, version: 0 };
}

/// Pages of a [`Bank`] that stand together.
const GROUP: usize = 512;

/// Neighbouring pages of a region, those that came to be.
type Group = [Option<Box<Page>>; GROUP];

/// A region of RAM with its pages in groups: a machine with much memory of which little is used is made at once.
#[derive(Debug)]
struct Bank {
    region: Region,
    groups: Vec<Option<Box<Group>>>,
}

impl Bank {
    fn new(region: Region) -> Self {
        let pages = usize::try_from(region.size / PAGE).expect("sim: RAM region is too large");
        Self { region, groups: std::iter::repeat_with(|| None).take(pages.div_ceil(GROUP)).collect() }
    }

    fn contains(&self, pa: u64) -> bool {
        pa.wrapping_sub(self.region.base) < self.region.size
    }

    /// The group and the place in it of the page that `pa`, which is in this bank, is in.
    fn place(&self, pa: u64) -> (usize, usize) {
        let page = ((pa - self.region.base) / PAGE) as usize;
        (page / GROUP, page % GROUP)
    }
}

/// The RAM of a machine.
#[derive(Debug)]
pub(crate) struct Ram {
    banks: Vec<Bank>,
    changes: u64,
}

impl Ram {
    /// Checks the regions and builds untouched RAM.
    pub(crate) fn new(regions: &[Region]) -> Self {
        let mut regions = regions.to_vec();
        regions.sort_by_key(|region| region.base);
        let mut free_from = 0;
        for region in &regions {
            assert!(
                region.base % PAGE == 0 && region.size % PAGE == 0 && region.size != 0,
                "sim: RAM region {region:x?} is empty or not page-aligned"
            );
            assert!(region.base >= free_from, "sim: RAM region {region:x?} overlaps another");
            free_from = region.base.checked_add(region.size).expect("sim: RAM region wraps");
        }
        Self { banks: regions.into_iter().map(Bank::new).collect(), changes: 0 }
    }

    /// Tells whether the page that `pa` is in is RAM.
    pub(crate) fn contains(&self, pa: u64) -> bool {
        self.banks.iter().any(|bank| bank.contains(pa))
    }

    /// Panics unless `pa` is in RAM: the code under test touched what is not memory.
    #[track_caller]
    pub(crate) fn check(&self, pa: u64, what: &str) {
        assert!(self.contains(pa), "sim: {what} at {pa:#x}, which is outside RAM");
    }

    /// Returns the page that `pa` is in: `Some(None)` if it never came to be, `None` outside RAM.
    fn page(&self, pa: u64) -> Option<Option<&Page>> {
        let bank = self.banks.iter().find(|bank| bank.contains(pa))?;
        let (group, place) = bank.place(pa);
        Some(bank.groups[group].as_ref().and_then(|group| group[place].as_deref()))
    }

    /// Reads the aligned word at `pa` as a CPU or a table walk does; `None` outside RAM.
    pub(crate) fn peek(&self, pa: u64) -> Option<u64> {
        Some(self.page(pa)?.map_or(0, |page| page.cached[word_of(pa)]))
    }

    /// Reads the aligned word at `pa` as it is at the PoC; `None` outside RAM.
    pub(crate) fn peek_poc(&self, pa: u64) -> Option<u64> {
        Some(self.page(pa)?.map_or(0, |page| page.at_poc.as_deref().unwrap_or(&page.cached)[word_of(pa)]))
    }

    /// Tells whether a page reads as zeros, through the caches and at the PoC.
    pub(crate) fn is_zero(&self, pa: u64) -> bool {
        let zero = |words: &[u64; WORDS]| words.iter().all(|word| *word == 0);
        self.page(pa)
            .flatten()
            .is_none_or(|page| zero(&page.cached) && page.at_poc.as_deref().is_none_or(zero))
    }

    /// Returns a number that grows with every write and every maintenance of a page.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// Returns a number that is another whenever something has happened to the page that `pa` is in.
    pub(crate) fn version(&self, pa: u64) -> u64 {
        self.page(pa).flatten().map_or(0, |page| page.version)
    }

    /// Returns all words of a page, `None` when nothing was ever written there.
    pub(crate) fn words(&self, page: u64) -> Option<&[u64; WORDS]> {
        self.page(page).flatten().map(|page| &page.cached)
    }

    fn page_mut(&mut self, pa: u64) -> &mut Page {
        self.changes += 1;
        let bank = self.banks.iter_mut().find(|bank| bank.contains(pa));
        let bank = bank.unwrap_or_else(|| panic!("sim: {pa:#x} is outside RAM"));
        let (group, place) = bank.place(pa);
        let group = bank.groups[group].get_or_insert_with(|| Box::new([const { None }; GROUP]));
        let page = group[place].get_or_insert_with(|| Box::new(Page::EMPTY));
        page.version = self.changes;
        page
    }

    /// Writes the aligned word at `pa`, which the caller knows to be RAM. The page becomes dirty.
    pub(crate) fn poke(&mut self, pa: u64, value: u64) {
        let page = self.page_mut(pa);
        if page.at_poc.is_none() {
            page.at_poc = Some(Box::new(page.cached));
        }
        page.cached[word_of(pa)] = value;
    }

    /// Zeroes a page in the caches only. What was in it may have been evicted just before, so that is
    /// what is at the PoC from now on.
    pub(crate) fn zero(&mut self, pa: u64) {
        let page = self.page_mut(pa);
        page.at_poc = Some(Box::new(page.cached));
        page.cached = [0; WORDS];
    }

    /// Fills a page, in the caches and at the PoC.
    pub(crate) fn fill(&mut self, pa: u64, word: u64) {
        let page = self.page_mut(pa);
        page.cached = [word; WORDS];
        page.at_poc = None;
    }

    /// Cleans a page to the PoC and counts it.
    pub(crate) fn clean(&mut self, pa: u64) {
        let page = self.page_mut(pa);
        page.at_poc = None;
        page.cleans += 1;
    }

    /// Zeroes a page, cleans it to the PoC and counts it.
    pub(crate) fn wipe(&mut self, pa: u64) {
        let page = self.page_mut(pa);
        page.at_poc = None;
        page.cached = [0; WORDS];
        page.wipes += 1;
    }

    /// Tells whether the page that `pa` is in was written since it was last cleaned or wiped.
    pub(crate) fn is_dirty(&self, pa: u64) -> bool {
        self.page(pa).flatten().is_some_and(|page| page.at_poc.is_some())
    }

    /// Returns how often the page was wiped and cleaned.
    pub(crate) fn maintenance(&self, pa: u64) -> (usize, usize) {
        self.page(pa).flatten().map_or((0, 0), |page| (page.wipes, page.cleans))
    }

    /// Returns the number of pages that came to be.
    pub(crate) fn resident(&self) -> usize {
        self.banks
            .iter()
            .flat_map(|bank| &bank.groups)
            .flatten()
            .flat_map(|group| group.iter())
            .flatten()
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> Ram {
        Ram::new(&[Region { base: 0x8000, size: 0x2000 }, Region { base: 0x1000, size: 0x1000 }])
    }

    #[test]
    fn untouched_page_reads_zero_and_takes_no_memory() {
        let ram = ram();
        assert_eq!(ram.peek(0x8ff8), Some(0));
        assert_eq!(ram.resident(), 0);
    }

    #[test]
    fn regions_end_where_they_say() {
        let ram = ram();
        assert!(ram.contains(0x1000) && ram.contains(0x1fff) && ram.contains(0x9fff));
        assert!(!ram.contains(0xfff) && !ram.contains(0x2000) && !ram.contains(0xa000));
        assert_eq!(ram.peek(0x2000), None);
        assert_eq!(ram.peek_poc(0x2000), None);
    }

    #[test]
    #[should_panic(expected = "overlaps")]
    fn overlapping_regions_are_refused() {
        let _ = Ram::new(&[Region { base: 0, size: 0x2000 }, Region { base: 0x1000, size: 0x1000 }]);
    }

    #[test]
    #[should_panic(expected = "not page-aligned")]
    fn unaligned_region_is_refused() {
        let _ = Ram::new(&[Region { base: 0x800, size: 0x1000 }]);
    }

    #[test]
    fn written_data_reaches_the_poc_only_when_cleaned() {
        let mut ram = ram();
        ram.poke(0x8008, 6);
        ram.poke(0x8008, 7);
        assert_eq!((ram.peek(0x8008), ram.peek_poc(0x8008)), (Some(7), Some(0)));
        assert!(ram.is_dirty(0x8fff) && !ram.is_dirty(0x9000));
        ram.clean(0x8000);
        assert_eq!(ram.peek_poc(0x8008), Some(7));
        assert!(!ram.is_dirty(0x8000));
        assert_eq!(ram.maintenance(0x8000), (0, 1));
    }

    #[test]
    fn zeroing_without_cleaning_leaves_the_old_data_at_the_poc() {
        let mut ram = ram();
        ram.poke(0x8000, 0x5ec2e7);
        ram.zero(0x8000);
        assert_eq!((ram.peek(0x8000), ram.peek_poc(0x8000)), (Some(0), Some(0x5ec2e7)));
        ram.wipe(0x8000);
        assert_eq!(ram.peek_poc(0x8000), Some(0));
        assert_eq!(ram.maintenance(0x8000), (1, 0));
    }
}
