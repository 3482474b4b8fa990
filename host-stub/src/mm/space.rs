//! An address space: regions, the tables below them, and every access of the kernel to a program's memory.
//!
//! The kernel never dereferences a program's pointer. It resolves the page (faulting it in as the program
//! would) and goes through the linear map; for content of a guest_memfd that means asking the gate each time.

use alloc::rc::Rc;
use alloc::vec::Vec;
use core::ops::Range;

use super::regions::{Cut, Region};
use super::table::{LEAF_SPAN, MapError, Table};
use super::{Holder, PAGE, Pfn, Prot, Regions, page_down, pieces};
use crate::errno::Errno;
use crate::gmem::gate::{self, Intent, Refusal};
use crate::gmem::{Inode, View};
use crate::host::Host;
use crate::kvm::VcpuRef;
use crate::machine::Abort;

/// Addresses of programs: page 0 and what is near it stays empty.
pub const USER: Range<u64> = 0x1_0000..0x8000_0000_0000;
/// Where `mmap` without an address begins to look.
pub const MMAP_BASE: u64 = 0x10_0000_0000;

/// What a region is mapped onto.
#[derive(Clone, Debug)]
pub enum Backing {
    /// Zero pages on demand.
    Anonymous,
    /// Content of a guest_memfd.
    Content {
        /// The file that was mapped.
        view: Rc<View>,
        /// Index of the content's page at the region's start.
        first: u64,
    },
    /// A vCPU's `kvm_run`.
    Run {
        /// The vCPU.
        vcpu: VcpuRef,
        /// Index of the page at the region's start; only page 0 exists.
        first: u64,
    },
    /// A page of the kernel's, for example the one with the signal return.
    Kernel {
        /// The frame.
        frame: Pfn,
    },
}

impl Cut for Backing {
    fn advanced(&self, pages: u64) -> Self {
        match self {
            Self::Content { view, first } => {
                Self::Content { view: view.clone(), first: first.saturating_add(pages) }
            }
            Self::Run { vcpu, first } => Self::Run { vcpu: vcpu.clone(), first: first.saturating_add(pages) },
            other => other.clone(),
        }
    }
}

/// Kind of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A load.
    Read,
    /// A store.
    Write,
    /// An instruction fetch.
    Execute,
}

impl Access {
    const fn needs(self) -> Prot {
        match self {
            Self::Read => Prot::READ,
            Self::Write => Prot::WRITE,
            Self::Execute => Prot::EXEC,
        }
    }
}

/// Why an access cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No region is there (SIGSEGV, SEGV_MAPERR).
    NoRegion,
    /// The region does not allow it (SIGSEGV, SEGV_ACCERR).
    Denied,
    /// There is a region, but nothing behind it that the host may touch (SIGBUS, BUS_ADRERR).
    NothingThere,
    /// No frame is free.
    NoMemory,
}

impl From<Fault> for Errno {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NoMemory => Self::ENOMEM,
            Fault::NoRegion | Fault::Denied | Fault::NothingThere => Self::EFAULT,
        }
    }
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoMemory => Self::NoMemory,
            Refusal::BeyondEnd | Refusal::Private => Self::NothingThere,
        }
    }
}

impl From<MapError> for Fault {
    fn from(error: MapError) -> Self {
        match error {
            MapError::NoMemory => Self::NoMemory,
            MapError::Occupied | MapError::Inaccessible => Self::NothingThere,
        }
    }
}

/// The memory of one process.
#[derive(Debug)]
pub struct AddressSpace {
    asid: u16,
    table: Table,
    regions: Regions<Backing>,
}

impl AddressSpace {
    /// Makes an empty one. `asid` is not in use.
    pub fn new(host: &mut Host, asid: u16) -> Result<Self, Errno> {
        let table = Table::new(host.machine, &mut host.frames).map_err(|_| Errno::ENOMEM)?;
        Ok(Self { asid, table, regions: Regions::new(USER) })
    }

    /// What goes into TTBR0_EL1: root and ASID.
    pub fn root(&self) -> (Pfn, u16) {
        (self.table.root(), self.asid)
    }

    /// Its regions.
    pub fn regions(&self) -> &Regions<Backing> {
        &self.regions
    }

    /// Maps a region where nothing is.
    pub fn map(&mut self, range: Range<u64>, prot: Prot, backing: Backing) -> Result<(), Errno> {
        self.regions.insert(range, prot, backing).map_err(|error| match error {
            super::regions::RegionError::Invalid => Errno::EINVAL,
            super::regions::RegionError::Overlap => Errno::EEXIST,
            super::regions::RegionError::Full => Errno::ENOMEM,
        })
    }

    /// Unmaps a range. Anonymous pages are freed, unless a VM has them: those are returned, for the caller to take back
    /// first. Also returns what the regions were mapped onto; the caller lets go of it.
    #[must_use = "the backings must be released and the lent pages taken back"]
    pub fn unmap(&mut self, host: &mut Host, range: &Range<u64>) -> Unmapped {
        let mut unmapped = Unmapped::default();
        for region in self.regions.remove(range) {
            let anonymous = matches!(region.backing, Backing::Anonymous);
            self.unmap_pages(host, region.start..region.end, &mut |host, frame| {
                if !anonymous {
                    return;
                }
                match host.frames.holder(frame) {
                    Some(holder) if holder.is_given_away() => unmapped.lent.push(frame),
                    _ => host.give_back(frame),
                }
            });
            unmapped.backings.push(region.backing);
        }
        unmapped
    }

    /// Unmaps every page that maps one of these pages of content, and forgets its translation.
    pub fn unmap_content(&self, host: &mut Host, inode: &Rc<Inode>, pages: &Range<u64>) {
        for region in self.regions.iter() {
            if let Some(range) = content_range(region, inode, pages) {
                self.unmap_pages(host, range, &mut |_, _| ());
            }
        }
    }

    /// Whether a page of content is mapped anywhere here.
    #[cfg(test)]
    pub fn maps_content(&self, host: &Host, inode: &Rc<Inode>, page: u64) -> bool {
        self.regions
            .iter()
            .filter_map(|region| content_range(region, inode, &(page..page.saturating_add(1))))
            .any(|range| self.table.lookup(host.machine, range.start).is_some())
    }

    /// Unmaps pages, and does something with their frames when no CPU can reach them any more. Of several,
    /// the whole address space is forgotten: to ask the other CPUs once costs less than to ask for each page.
    fn unmap_pages(&self, host: &mut Host, range: Range<u64>, each: &mut dyn FnMut(&mut Host, Pfn)) {
        // One alone needs no list.
        let (mut first, mut more) = (None, Vec::new());
        let mut address = range.start;
        while address < range.end {
            if self.table.has_leaf_table(host.machine, address) {
                if let Some(frame) = self.table.clear(host.machine, address) {
                    match first {
                        None => first = Some((address, frame)),
                        Some(_) => more.push(frame),
                    }
                }
                address = address.saturating_add(PAGE);
            } else {
                address = (address | (LEAF_SPAN - 1)).saturating_add(1);
            }
        }
        let Some((address, frame)) = first else { return };
        if more.is_empty() {
            host.machine.flush_page(self.asid, address);
        } else {
            host.machine.flush_space(self.asid);
        }
        for frame in core::iter::once(frame).chain(more) {
            each(host, frame);
        }
    }

    /// Ends the address space. Everything is unmapped as by [`AddressSpace::unmap`].
    pub fn destroy(mut self, host: &mut Host) -> Unmapped {
        let unmapped = self.unmap(host, &USER);
        self.table.destroy(host.machine, &mut host.frames, self.asid);
        unmapped
    }

    /// Serves a fault of the program: after success the access will succeed.
    pub fn fault_in(&mut self, host: &mut Host, address: u64, access: Access) -> Result<Pfn, Fault> {
        let page = page_down(address);
        let region = self.regions.find(page).ok_or(Fault::NoRegion)?;
        if !region.prot.contains(access.needs()) {
            return Err(Fault::Denied);
        }
        let prot = region.prot;
        let mapped = self.table.lookup(host.machine, page);
        let index = page.saturating_sub(region.start) / PAGE;
        let frame = match &region.backing {
            Backing::Anonymous => match mapped {
                Some(mapping) => mapping.frame,
                None => host.take_zeroed(Holder::Program).map_err(|_| Fault::NoMemory)?,
            },
            Backing::Content { view, first } => {
                gate::admit(host, view.inode(), first.saturating_add(index), Intent::Fault)?
            }
            Backing::Run { vcpu, first } if first.saturating_add(index) == 0 => vcpu.run_page(),
            Backing::Run { .. } => return Err(Fault::NothingThere),
            Backing::Kernel { frame } => *frame,
        };
        match mapped {
            Some(mapping) if mapping.frame == frame => return Ok(frame),
            Some(_) => self.unmap_pages(host, page..page.saturating_add(PAGE), &mut |_, _| ()),
            None => {}
        }
        // Before another CPU can fetch from it.
        if prot.contains(Prot::EXEC) {
            host.machine.make_executable(frame);
        }
        if let Err(error) = self.table.map(host.machine, &mut host.frames, page, frame, prot) {
            if matches!(region.backing, Backing::Anonymous) {
                host.give_back(frame);
            }
            return Err(error.into());
        }
        Ok(frame)
    }

    /// Finds the frame of a page for an access by the kernel. Content is asked for anew each time; unlike
    /// a fault of the program, the access leaves no mapping behind for it.
    pub fn resolve(&mut self, host: &mut Host, address: u64, access: Access) -> Result<Pfn, Fault> {
        let page = page_down(address);
        let region = self.regions.find(page).ok_or(Fault::NoRegion)?;
        if !region.prot.contains(access.needs()) {
            return Err(Fault::Denied);
        }
        if let Backing::Content { view, first } = &region.backing {
            let index = first.saturating_add(page.saturating_sub(region.start) / PAGE);
            return Ok(gate::admit(host, view.inode(), index, Intent::Copy)?);
        }
        self.fault_in(host, address, access)
    }

    /// Copies out of the program's memory; all or nothing but for what was copied before a fault.
    pub fn read(&mut self, host: &mut Host, address: u64, into: &mut [u8]) -> Result<(), Errno> {
        check_span(address, into.len())?;
        for piece in pieces(address, into.len()) {
            let frame = self.resolve(host, piece.address, Access::Read)?;
            let end = piece.offset.saturating_add(piece.length);
            let part = into.get_mut(piece.offset..end).ok_or(Errno::EFAULT)?;
            let read = host.machine.read(frame.address() | (piece.address % PAGE), part);
            check_access(host, read)?;
        }
        Ok(())
    }

    /// Copies into the program's memory.
    pub fn write(&mut self, host: &mut Host, address: u64, from: &[u8]) -> Result<(), Errno> {
        check_span(address, from.len())?;
        for piece in pieces(address, from.len()) {
            let frame = self.resolve(host, piece.address, Access::Write)?;
            let end = piece.offset.saturating_add(piece.length);
            let part = from.get(piece.offset..end).ok_or(Errno::EFAULT)?;
            let written = host.machine.write(frame.address() | (piece.address % PAGE), part);
            check_access(host, written)?;
        }
        Ok(())
    }

    /// Fills fresh anonymous pages, whatever the region allows the program: for the loader.
    pub fn load(&mut self, host: &mut Host, address: u64, from: &[u8]) -> Result<(), Errno> {
        check_span(address, from.len())?;
        for piece in pieces(address, from.len()) {
            let region = self.regions.find(piece.address).ok_or(Errno::EFAULT)?;
            if !matches!(region.backing, Backing::Anonymous) {
                return Err(Errno::EFAULT);
            }
            let (prot, page) = (region.prot, page_down(piece.address));
            let frame = match self.table.lookup(host.machine, page) {
                Some(mapping) => mapping.frame,
                None => {
                    let frame = host.take_zeroed(Holder::Program)?;
                    let mapped = self.table.map(host.machine, &mut host.frames, page, frame, prot);
                    if mapped.is_err() {
                        host.give_back(frame);
                        return Err(Errno::ENOMEM);
                    }
                    frame
                }
            };
            let end = piece.offset.saturating_add(piece.length);
            let part = from.get(piece.offset..end).ok_or(Errno::EFAULT)?;
            let written = host.machine.write(frame.address() | (piece.address % PAGE), part);
            check_access(host, written)?;
            if prot.contains(Prot::EXEC) {
                host.machine.make_executable(frame);
            }
        }
        Ok(())
    }
}

/// What an unmapping leaves to do.
#[derive(Debug, Default)]
pub struct Unmapped {
    /// What the regions were mapped onto.
    pub backings: Vec<Backing>,
    /// Anonymous pages that a VM still uses.
    pub lent: Vec<Pfn>,
}

/// An access that EL2 refused is EFAULT to the program.
fn check_access(host: &mut Host, outcome: Result<(), Abort>) -> Result<(), Errno> {
    outcome.map_err(|abort| {
        host.note_abort(abort);
        Errno::EFAULT
    })
}

fn check_span(address: u64, length: usize) -> Result<(), Errno> {
    address.checked_add(length as u64).filter(|end| *end <= USER.end).map(|_| ()).ok_or(Errno::EFAULT)
}

/// The addresses at which a region maps these pages of this content.
fn content_range(region: &Region<Backing>, inode: &Rc<Inode>, pages: &Range<u64>) -> Option<Range<u64>> {
    let Backing::Content { view, first } = &region.backing else { return None };
    if !Rc::ptr_eq(view.inode(), inode) {
        return None;
    }
    let count = region.end.saturating_sub(region.start) / PAGE;
    let start = pages.start.max(*first);
    let end = pages.end.min(first.saturating_add(count));
    if start >= end {
        return None;
    }
    let address = |page: u64| region.start.saturating_add(page.saturating_sub(*first).saturating_mul(PAGE));
    Some(address(start)..address(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Misbehaviour;
    use crate::testing::{Event, FakeMachine, World};
    use abi::HostState;

    const AT: u64 = 0x40_0000;

    #[test]
    fn anonymous_pages_come_as_zeros_on_demand_and_return() {
        let machine = FakeMachine::new(32);
        let mut host = machine.host();
        let mut space = AddressSpace::new(&mut host, 1).unwrap();
        space.map(AT..AT + 4 * PAGE, Prot::READ | Prot::WRITE, Backing::Anonymous).unwrap();
        let free = host.frames.free();
        let mut bytes = [1; 8];
        space.read(&mut host, AT + PAGE - 4, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 8]);
        space.write(&mut host, AT + PAGE - 4, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        space.read(&mut host, AT + PAGE - 4, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(host.frames.free() < free);
        assert!(space.destroy(&mut host).lent.is_empty());
        assert_eq!(host.frames.free(), 32);
    }

    #[test]
    fn what_the_region_does_not_allow_is_refused_to_program_and_kernel() {
        let machine = FakeMachine::new(32);
        let mut host = machine.host();
        let mut space = AddressSpace::new(&mut host, 1).unwrap();
        space.map(AT..AT + PAGE, Prot::READ, Backing::Anonymous).unwrap();
        assert_eq!(space.fault_in(&mut host, AT, Access::Write), Err(Fault::Denied));
        assert_eq!(space.fault_in(&mut host, AT, Access::Execute), Err(Fault::Denied));
        assert_eq!(space.fault_in(&mut host, AT - 1, Access::Read), Err(Fault::NoRegion));
        assert_eq!(space.write(&mut host, AT, &[0]), Err(Errno::EFAULT));
        assert_eq!(space.read(&mut host, AT + PAGE - 1, &mut [0; 2]), Err(Errno::EFAULT));
        assert_eq!(space.read(&mut host, u64::MAX, &mut [0; 2]), Err(Errno::EFAULT));
        assert_eq!(space.read(&mut host, USER.end - 1, &mut [0; 2]), Err(Errno::EFAULT));
    }

    #[test]
    fn the_kernel_asks_for_content_each_time_although_it_is_mapped() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        let frame = world.touch(0).unwrap();
        let asked = machine.queries(frame);
        world.caller.space.write(&mut world.host, World::VA, &[1; 8]).unwrap();
        assert_eq!(machine.queries(frame), asked + 1);
        machine.set_state(frame, HostState::NoPage);
        let write = world.caller.space.write(&mut world.host, World::VA, &[1; 8]);
        assert_eq!(write, Err(Errno::EFAULT));
        assert_eq!(machine.queries(frame), asked + 2);
    }

    #[test]
    fn an_access_of_the_kernel_leaves_no_mapping_and_asks_even_where_faults_do_not() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        world.caller.space.write(&mut world.host, World::VA, &[1; 8]).unwrap();
        assert!(!world.caller.space.maps_content(&world.host, world.inode(), 0));
        machine.set_state(world.frame(0), HostState::NoPage);
        world.host.misbehaviour = Misbehaviour::MAP_WITHOUT_ASKING;
        let write = world.caller.space.write(&mut world.host, World::VA, &[1; 8]);
        assert_eq!(write, Err(Errno::EFAULT));
        assert_eq!(world.host.counters.marked_aborts, 0, "the page was not even touched");
    }

    #[test]
    fn content_beyond_the_end_has_nothing_behind_it() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 2);
        let view = world.view().clone();
        let at = World::VA + 16 * PAGE;
        let backing = Backing::Content { view, first: 1 };
        world.caller.space.map(at..at + 2 * PAGE, Prot::READ, backing).unwrap();
        assert!(world.caller.space.fault_in(&mut world.host, at, Access::Read).is_ok());
        let beyond = world.caller.space.fault_in(&mut world.host, at + PAGE, Access::Read);
        assert_eq!(beyond, Err(Fault::NothingThere));
    }

    #[test]
    fn content_is_unmapped_from_every_region_that_shows_it() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        let at = World::VA + 16 * PAGE;
        let backing = Backing::Content { view: world.view().clone(), first: 2 };
        world.caller.space.map(at..at + 2 * PAGE, Prot::READ, backing).unwrap();
        world.touch(2).unwrap();
        world.caller.space.fault_in(&mut world.host, at, Access::Read).unwrap();
        let inode = world.inode().clone();
        world.caller.space.unmap_content(&mut world.host, &inode, &(2..3));
        assert!(!world.caller.space.maps_content(&world.host, &inode, 2));
        assert_eq!(machine.flushed(), [(1, World::VA + 2 * PAGE), (1, at)]);
    }

    #[test]
    fn several_pages_are_forgotten_at_once() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        world.touch(0).unwrap();
        world.touch(3).unwrap();
        let inode = world.inode().clone();
        machine.events();
        world.caller.space.unmap_content(&mut world.host, &inode, &(0..4));
        assert_eq!(machine.events(), [Event::FlushSpace]);
        world.caller.space.unmap_content(&mut world.host, &inode, &(0..4));
        assert_eq!(machine.events(), []);
    }

    #[test]
    fn unmapping_content_keeps_its_pages() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        let frame = world.touch(0).unwrap();
        let unmapped = world.caller.space.unmap(&mut world.host, &(World::VA..World::VA + 4 * PAGE));
        assert_eq!(unmapped.backings.len(), 1);
        assert_eq!(world.host.frames.holder(frame), Some(Holder::Content));
    }

    #[test]
    fn lack_of_frames_is_a_fault_and_loses_nothing() {
        let machine = FakeMachine::new(5);
        let mut host = machine.host();
        let mut space = AddressSpace::new(&mut host, 1).unwrap();
        space.map(AT..AT + 8 * PAGE, Prot::READ | Prot::WRITE, Backing::Anonymous).unwrap();
        space.fault_in(&mut host, AT, Access::Read).unwrap();
        assert_eq!(space.fault_in(&mut host, AT + PAGE, Access::Read), Err(Fault::NoMemory));
        assert!(space.destroy(&mut host).backings.len() == 1);
        assert_eq!(host.frames.free(), 5);
    }
}
