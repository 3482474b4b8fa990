//! Stage-1 tables of a process: four levels of 4 KiB tables, pages only (Arm ARM, VMSAv8-64, section D8.3).
//!
//! Owns the table frames below one root. An entry goes from invalid to valid and back, never from one
//! valid page to another, so no break-before-make sequence is needed but [`Table::clear`] and what its caller then forgets
//! ([`Memory::flush_page`]).

use super::{Frames, Holder, PAGE, Pfn, Prot};
use crate::machine::Memory;

const VALID: u64 = 1 << 0;
const TABLE_OR_PAGE: u64 = 1 << 1;
const MEMORY_NORMAL: u64 = 1 << 2;
const EL0: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 3 << 8;
const ACCESS_FLAG: u64 = 1 << 10;
const NOT_GLOBAL: u64 = 1 << 11;
const NO_EXEC_EL1: u64 = 1 << 53;
const NO_EXEC_EL0: u64 = 1 << 54;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

const LEVELS: u32 = 4;
const INDEX_BITS: u32 = 9;
const ENTRIES: u64 = 1 << INDEX_BITS;

/// Why a page was not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// No frame for a table.
    NoMemory,
    /// Something is mapped there.
    Occupied,
    /// A table was not accessible.
    Inaccessible,
}

/// The tables of one address space.
#[derive(Debug)]
pub struct Table {
    root: Pfn,
}

/// A page as it is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The frame.
    pub frame: Pfn,
    /// Stores are allowed.
    pub write: bool,
}

fn index(address: u64, level: u32) -> u64 {
    let shift = 12 + INDEX_BITS * (LEVELS - 1 - level);
    (address >> shift) & (ENTRIES - 1)
}

fn entry_address(table: Pfn, address: u64, level: u32) -> u64 {
    table.address() | (index(address, level) * 8)
}

fn next_table(entry: u64) -> Option<Pfn> {
    (entry & VALID != 0).then(|| Pfn::containing(entry & ADDRESS))
}

/// Descriptor of a page of EL0. What EL0 may store to or fetch from, it may load from.
pub fn page_descriptor(frame: Pfn, prot: Prot) -> u64 {
    let mut entry = frame.address()
        | VALID
        | TABLE_OR_PAGE
        | MEMORY_NORMAL
        | EL0
        | INNER_SHAREABLE
        | ACCESS_FLAG
        | NOT_GLOBAL
        | NO_EXEC_EL1;
    if !prot.contains(Prot::WRITE) {
        entry |= READ_ONLY;
    }
    if !prot.contains(Prot::EXEC) {
        entry |= NO_EXEC_EL0;
    }
    entry
}

fn new_table(memory: &dyn Memory, frames: &mut Frames) -> Result<Pfn, MapError> {
    let frame = frames.take(Holder::Table).ok_or(MapError::NoMemory)?;
    if memory.zero(frame).is_err() {
        frames.note(frame, Holder::Lost);
        return Err(MapError::Inaccessible);
    }
    Ok(frame)
}

impl Table {
    /// Makes empty tables.
    pub fn new(memory: &dyn Memory, frames: &mut Frames) -> Result<Self, MapError> {
        Ok(Self { root: new_table(memory, frames)? })
    }

    /// What goes into TTBR0_EL1.
    pub fn root(&self) -> Pfn {
        self.root
    }

    /// The address of the last-level entry, if its table exists.
    fn leaf(&self, memory: &dyn Memory, address: u64) -> Option<u64> {
        let mut table = self.root;
        for level in 0..LEVELS - 1 {
            table = next_table(memory.load(entry_address(table, address, level)).ok()?)?;
        }
        Some(entry_address(table, address, LEVELS - 1))
    }

    /// Maps a page where none is.
    pub fn map(
        &self,
        memory: &dyn Memory,
        frames: &mut Frames,
        address: u64,
        frame: Pfn,
        prot: Prot,
    ) -> Result<(), MapError> {
        let load = |at| memory.load(at).map_err(|_| MapError::Inaccessible);
        let store = |at, value| memory.store(at, value).map_err(|_| MapError::Inaccessible);
        let mut table = self.root;
        for level in 0..LEVELS - 1 {
            let at = entry_address(table, address, level);
            table = match next_table(load(at)?) {
                Some(next) => next,
                None => {
                    let next = new_table(memory, frames)?;
                    memory.publish_tables();
                    store(at, next.address() | VALID | TABLE_OR_PAGE)?;
                    next
                }
            };
        }
        let at = entry_address(table, address, LEVELS - 1);
        if load(at)? & VALID != 0 {
            return Err(MapError::Occupied);
        }
        store(at, page_descriptor(frame, prot))?;
        memory.publish_tables();
        Ok(())
    }

    /// What is mapped at an address.
    pub fn lookup(&self, memory: &dyn Memory, address: u64) -> Option<Mapping> {
        let entry = memory.load(self.leaf(memory, address)?).ok()?;
        next_table(entry).map(|frame| Mapping { frame, write: entry & READ_ONLY == 0 })
    }

    /// Whether a table for the pages around this address exists.
    pub fn has_leaf_table(&self, memory: &dyn Memory, address: u64) -> bool {
        self.leaf(memory, address).is_some()
    }

    /// Unmaps a page. Returns the frame, which the program can reach until its translation is forgotten.
    pub fn clear(&self, memory: &dyn Memory, address: u64) -> Option<Pfn> {
        let at = self.leaf(memory, address)?;
        let frame = next_table(memory.load(at).ok()?)?;
        memory.store(at, 0).ok()?;
        Some(frame)
    }

    /// Frees all tables. Nothing may be mapped any more and the tables must not be in use.
    pub fn destroy(self, memory: &dyn Memory, frames: &mut Frames, asid: u16) {
        memory.flush_space(asid);
        free_tables(memory, frames, self.root, 0);
    }
}

/// Frees a table and those below it; the depth is bounded by the number of levels.
fn free_tables(memory: &dyn Memory, frames: &mut Frames, table: Pfn, level: u32) {
    if level < LEVELS - 1 {
        for index in 0..ENTRIES {
            if let Ok(entry) = memory.load(table.address() + index * 8)
                && let Some(next) = next_table(entry)
            {
                free_tables(memory, frames, next, level + 1);
            }
        }
    }
    if let Err(error) = frames.give_back(table) {
        log::error!("a table is no table: {error:?}");
    }
}

/// Bytes that one last-level table spans: a removal may skip this far where there is none.
pub const LEAF_SPAN: u64 = PAGE * ENTRIES;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeMachine;

    #[test]
    fn a_mapped_page_is_found_and_an_unmapped_one_is_not() {
        let machine = FakeMachine::new(32);
        let mut frames = machine.frames();
        let table = Table::new(&machine, &mut frames).unwrap();
        let frame = frames.take(Holder::Program).unwrap();
        table.map(&machine, &mut frames, 0x7fff_1234_5000, frame, Prot::READ | Prot::WRITE).unwrap();
        assert_eq!(table.lookup(&machine, 0x7fff_1234_5000), Some(Mapping { frame, write: true }));
        assert_eq!(table.lookup(&machine, 0x7fff_1234_6000), None);
        assert_eq!(
            table.map(&machine, &mut frames, 0x7fff_1234_5000, frame, Prot::READ),
            Err(MapError::Occupied)
        );
        assert_eq!(table.clear(&machine, 0x7fff_1234_5000), Some(frame));
        assert_eq!(table.clear(&machine, 0x7fff_1234_5000), None);
        assert_eq!(table.lookup(&machine, 0x7fff_1234_5000), None);
    }

    #[test]
    fn all_tables_return_to_the_free_frames() {
        let machine = FakeMachine::new(32);
        let mut frames = machine.frames();
        let before = frames.free();
        let table = Table::new(&machine, &mut frames).unwrap();
        let frame = frames.take(Holder::Program).unwrap();
        for address in [0x40_0000, 0x7fff_ffff_f000, 0x10_0000_0000] {
            table.map(&machine, &mut frames, address, frame, Prot::READ).unwrap();
            table.clear(&machine, address);
        }
        table.destroy(&machine, &mut frames, 1);
        frames.give_back(frame).unwrap();
        assert_eq!(frames.free(), before);
    }

    #[test]
    fn lack_of_frames_is_an_error_not_a_panic() {
        let machine = FakeMachine::new(2);
        let mut frames = machine.frames();
        let table = Table::new(&machine, &mut frames).unwrap();
        let map = table.map(&machine, &mut frames, 0, Pfn(1), Prot::READ);
        assert_eq!(map, Err(MapError::NoMemory));
    }

    #[test]
    fn el0_never_gets_more_than_it_asked_for() {
        let read = page_descriptor(Pfn(1), Prot::READ);
        assert_ne!(read & READ_ONLY, 0);
        assert_ne!(read & NO_EXEC_EL0, 0);
        let code = page_descriptor(Pfn(1), Prot::READ | Prot::EXEC);
        assert_ne!(code & READ_ONLY, 0);
        assert_eq!(code & NO_EXEC_EL0, 0);
        assert_ne!(code & NO_EXEC_EL1, 0);
    }
}
