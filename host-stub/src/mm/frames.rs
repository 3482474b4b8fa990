//! Page frames and the record of who holds each.
//!
//! Owns every page of RAM that the device tree gives to the host. The record is the host's own book: EL2
//! decides what is true, the book says what to ask for. Its rule: a frame that was given away, to the
//! hypervisor or to a VM, is never free before it was taken back ([`Frames::taken_back`]).

use abi::VmHandle;

use super::Pfn;

/// Who holds a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// Nobody.
    Free,
    /// It is no usable memory: a hole, the kernel image, the ramdisk, a reserved range.
    Reserved,
    /// The kernel itself.
    Kernel,
    /// A translation table of a process.
    Table,
    /// Anonymous memory of a process.
    Program,
    /// Content of a guest_memfd.
    Content,
    /// A program got it from the research device.
    Research,
    /// Given to one of the hypervisor's pools for good.
    HypPool,
    /// Given to a VM for its tables.
    VmPool(VmHandle),
    /// Donated to a protected VM.
    Guest {
        /// The VM.
        vm: VmHandle,
        /// Where the guest sees it.
        gfn: u32,
    },
    /// Lent to a VM that is not protected; the host uses it, too.
    Lent {
        /// The VM.
        vm: VmHandle,
        /// Where the guest sees it.
        gfn: u32,
    },
    /// Given away and never returned. It stays out of use.
    Lost,
}

impl Holder {
    /// Whether the frame may go straight back to the free ones.
    const fn is_the_hosts(self) -> bool {
        matches!(self, Self::Kernel | Self::Table | Self::Program | Self::Content | Self::Research)
    }

    /// Whether the frame was given to the hypervisor or to a VM.
    pub const fn is_given_away(self) -> bool {
        matches!(self, Self::HypPool | Self::VmPool(_) | Self::Guest { .. } | Self::Lent { .. })
    }
}

/// Number of frames by kind of holder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Held by nobody.
    pub free: u64,
    /// Used by the kernel and by programs.
    pub used: u64,
    /// Given to the hypervisor's pools.
    pub pools: u64,
    /// Given to VMs: content and tables.
    pub vms: u64,
    /// Given away and not returned.
    pub lost: u64,
}

/// Why a frame did not become free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFreed {
    /// The frame.
    pub frame: Pfn,
    /// Who holds it; `None` if it is no frame of the host's.
    pub holder: Option<Holder>,
}

/// All page frames.
#[derive(Debug)]
pub struct Frames {
    first: Pfn,
    records: &'static mut [Holder],
    /// No record before this one is free.
    next: usize,
    free: u64,
}

impl Frames {
    /// Begins with the frames from `first`, one a record, all reserved; [`Frames::release`] frees those that
    /// are RAM.
    pub fn new(first: Pfn, records: &'static mut [Holder]) -> Self {
        records.fill(Holder::Reserved);
        Self { first, records, next: 0, free: 0 }
    }

    fn index(&self, frame: Pfn) -> Option<usize> {
        let index = usize::try_from(frame.0.checked_sub(self.first.0)?).ok()?;
        (index < self.records.len()).then_some(index)
    }

    fn frame(&self, index: usize) -> Pfn {
        self.first.plus(index as u64)
    }

    fn slot(&mut self, frame: Pfn) -> Option<&mut Holder> {
        let index = self.index(frame)?;
        self.records.get_mut(index)
    }

    /// Puts reserved frames of `[start, end)` among the free ones. Frames outside the books are ignored.
    pub fn release(&mut self, start: Pfn, end: Pfn) {
        for number in start.0..end.0 {
            if self.holder(Pfn(number)) == Some(Holder::Reserved) {
                self.make_free(Pfn(number));
            }
        }
    }

    /// Takes free frames of `[start, end)` out of use.
    pub fn reserve(&mut self, start: Pfn, end: Pfn) {
        for number in start.0..end.0 {
            if let Some(holder) = self.slot(Pfn(number))
                && *holder == Holder::Free
            {
                *holder = Holder::Reserved;
                self.free = self.free.saturating_sub(1);
            }
        }
    }

    /// Takes a free frame for `holder`. Its content is whatever it was.
    pub fn take(&mut self, holder: Holder) -> Option<Pfn> {
        self.take_range(1, holder)
    }

    /// Takes `count` adjacent free frames.
    pub fn take_range(&mut self, count: u64, holder: Holder) -> Option<Pfn> {
        self.take_aligned(count, 1, holder)
    }

    /// Takes `count` adjacent free frames whose first number is a multiple of `align`.
    pub fn take_aligned(&mut self, count: u64, align: u64, holder: Holder) -> Option<Pfn> {
        let count = usize::try_from(count).ok().filter(|count| *count > 0)?;
        if (count as u64) > self.free {
            return None;
        }
        let start = self.find(self.next, count, align)?;
        let end = start.saturating_add(count);
        self.records.get_mut(start..end)?.fill(holder);
        self.free = self.free.saturating_sub(count as u64);
        if start == self.next {
            self.next = end;
        }
        Some(self.frame(start))
    }

    /// Finds `count` adjacent free records at or behind `from`.
    fn find(&self, from: usize, count: usize, align: u64) -> Option<usize> {
        let mut run = 0usize;
        for (index, holder) in self.records.iter().enumerate().skip(from) {
            let begins = run == 0 && !self.frame(index).0.is_multiple_of(align);
            run = if *holder == Holder::Free && !begins { run.saturating_add(1) } else { 0 };
            if run == count {
                return index.checked_add(1)?.checked_sub(count);
            }
        }
        None
    }

    /// Gives a frame of the host's back to the free ones. Refused for a frame that was given away.
    pub fn give_back(&mut self, frame: Pfn) -> Result<(), NotFreed> {
        let holder = self.holder(frame);
        if !holder.is_some_and(Holder::is_the_hosts) {
            return Err(NotFreed { frame, holder });
        }
        self.make_free(frame);
        Ok(())
    }

    /// Notes a new holder of a frame that is in use. A frame that is free or reserved stays what it is.
    pub fn note(&mut self, frame: Pfn, now: Holder) {
        if let Some(holder) = self.slot(frame)
            && !matches!(*holder, Holder::Free | Holder::Reserved)
            && !matches!(now, Holder::Free | Holder::Reserved)
        {
            *holder = now;
        }
    }

    /// Notes that EL2 has given a frame back, and frees it.
    pub fn taken_back(&mut self, frame: Pfn) {
        if self.holder(frame).is_some_and(|holder| holder.is_given_away() || holder.is_the_hosts()) {
            self.make_free(frame);
        }
    }

    fn make_free(&mut self, frame: Pfn) {
        let Some(index) = self.index(frame) else { return };
        if let Some(holder) = self.records.get_mut(index) {
            *holder = Holder::Free;
            self.free = self.free.saturating_add(1);
            self.next = self.next.min(index);
        }
    }

    /// Who holds a frame; `None` if it is none of the host's.
    pub fn holder(&self, frame: Pfn) -> Option<Holder> {
        self.records.get(self.index(frame)?).copied()
    }

    /// Number of free frames.
    pub fn free(&self) -> u64 {
        self.free
    }

    /// Counts frames by holder.
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        for holder in self.records.iter() {
            let count = match holder {
                Holder::Free => &mut census.free,
                Holder::Reserved => continue,
                Holder::HypPool => &mut census.pools,
                Holder::VmPool(_) | Holder::Guest { .. } | Holder::Lent { .. } => &mut census.vms,
                Holder::Lost => &mut census.lost,
                Holder::Kernel | Holder::Table | Holder::Program | Holder::Content | Holder::Research => {
                    &mut census.used
                }
            };
            *count = count.saturating_add(1);
        }
        census
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn frames(count: usize) -> Frames {
        let mut frames = Frames::new(Pfn(0x100), alloc::vec![Holder::Free; count].leak());
        frames.release(Pfn(0), Pfn(0x1000));
        frames
    }

    #[test]
    fn every_frame_is_given_once_and_then_none_is_left() {
        let mut frames = frames(8);
        let mut taken: Vec<_> = core::iter::from_fn(|| frames.take(Holder::Kernel)).collect();
        taken.sort_unstable();
        assert_eq!(taken, (0x100..0x108).map(Pfn).collect::<Vec<_>>());
        assert_eq!(frames.free(), 0);
        frames.give_back(Pfn(0x103)).unwrap();
        assert_eq!(frames.take(Holder::Program), Some(Pfn(0x103)));
    }

    #[test]
    fn a_range_is_adjacent_and_a_hole_is_not_crossed() {
        let mut frames = frames(8);
        frames.reserve(Pfn(0x103), Pfn(0x104));
        assert_eq!(frames.take_range(5, Holder::Kernel), None);
        assert_eq!(frames.take_range(4, Holder::Kernel), Some(Pfn(0x104)));
        assert_eq!(frames.take_range(3, Holder::Kernel), Some(Pfn(0x100)));
        assert_eq!(frames.take_range(0, Holder::Kernel), None);
    }

    #[test]
    fn an_aligned_range_begins_at_a_multiple() {
        let mut frames = frames(8);
        frames.take(Holder::Kernel).unwrap();
        assert_eq!(frames.take_aligned(2, 2, Holder::Kernel), Some(Pfn(0x102)));
        assert_eq!(frames.take_aligned(4, 4, Holder::Kernel), Some(Pfn(0x104)));
        assert_eq!(frames.take_aligned(1, 2, Holder::Kernel), None);
    }

    #[test]
    fn the_lowest_free_frames_are_taken_first() {
        let mut frames = frames(8);
        assert_eq!(frames.take_range(6, Holder::Kernel), Some(Pfn(0x100)));
        frames.give_back(Pfn(0x104)).unwrap();
        frames.give_back(Pfn(0x101)).unwrap();
        assert_eq!(frames.take_range(2, Holder::Kernel), Some(Pfn(0x106)));
        assert_eq!(frames.take(Holder::Kernel), Some(Pfn(0x101)));
        assert_eq!(frames.take(Holder::Kernel), Some(Pfn(0x104)));
        assert_eq!(frames.take(Holder::Kernel), None);
    }

    #[test]
    fn a_frame_given_away_is_not_freed_before_it_is_taken_back() {
        let mut frames = frames(4);
        let frame = frames.take(Holder::Content).unwrap();
        let vm = VmHandle::new(1, 1).unwrap();
        for holder in [Holder::Guest { vm, gfn: 7 }, Holder::VmPool(vm), Holder::HypPool, Holder::Lost] {
            frames.note(frame, holder);
            assert_eq!(frames.give_back(frame), Err(NotFreed { frame, holder: Some(holder) }));
        }
        frames.note(frame, Holder::Guest { vm, gfn: 7 });
        frames.taken_back(frame);
        assert_eq!(frames.holder(frame), Some(Holder::Free));
        assert_eq!(frames.free(), 4);
    }

    #[test]
    fn a_frame_is_not_freed_twice_and_a_foreign_one_not_at_all() {
        let mut frames = frames(4);
        let frame = frames.take(Holder::Kernel).unwrap();
        frames.give_back(frame).unwrap();
        assert!(frames.give_back(frame).is_err());
        frames.taken_back(frame);
        assert_eq!(frames.give_back(Pfn(1)), Err(NotFreed { frame: Pfn(1), holder: None }));
        assert_eq!(frames.free(), 4);
    }

    #[test]
    fn the_census_counts_each_kind() {
        let mut frames = frames(10);
        let vm = VmHandle::new(0, 1).unwrap();
        frames.take_range(2, Holder::HypPool).unwrap();
        frames.take_range(3, Holder::VmPool(vm)).unwrap();
        frames.take(Holder::Program).unwrap();
        let census = frames.census();
        assert_eq!(census, Census { free: 4, used: 1, pools: 2, vms: 3, lost: 0 });
    }
}
