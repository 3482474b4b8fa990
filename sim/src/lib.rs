//! The simulated machine on which the hypervisor's ownership core runs in tests on the build machine.
//!
//! The hypervisor's core writes real VMSAv8-64 descriptors into simulated RAM; this crate translates through them
//! the way a processor may, and reports what an honest processor would never tell. It knows nothing of Deed, but
//! that VMID 0 is the host's: neither its ABI nor its page-table code is used here, so that one misreading of the
//! architecture does not end up on both sides of a comparison.
//!
//! | module | what it holds |
//! |---|---|
//! | `ram` | sparse memory, and what an observer past the caches would see of it |
//! | `memory` | the hypervisor's own loads, stores and cache maintenance ([`Sim::load64`], [`Sim::wipe_page`], ...) |
//! | `format` | descriptors of stage 2 and of EL2 stage 1, 4 KiB granule (Arm ARM D8.3) |
//! | `walk` | the table walk, and the enumeration of everything reachable (Arm ARM D8.2) |
//! | `tlb` | a TLB that keeps every translation and every table pointer until the right invalidation |
//! | `mmu` | accesses of CPUs through translation, speculation, stale entries ([`Sim::access_stage2`], ...) |
//! | `maintained` | pages that were wiped or cleaned while somebody still had them |
//! | `pending` | what an invalidation still has to cover |
//! | `tables` | the discipline of descriptor writes: break-before-make, initialised tables, no use after free |
//! | `protocol` | descriptor writes and TLB maintenance as the hypervisor issues them ([`Sim::write_desc`], ...) |
//! | `log` | events and violations |
//!
//! Rules of the machine:
//! 1. It is adversarial. Whatever a processor may do to the detriment of the hypervisor, it does: a cached
//!    translation is used for as long as it allows more than the tables, and data that was not cleaned is
//!    not at the point of coherency.
//! 2. It is deterministic. The same calls give the same results; nothing depends on time or on a hash seed.
//! 3. It is thread-safe. One lock guards the whole machine, so each call is one atomic step.
//! 4. A wrong *use* of the machine (an address outside RAM, a CPU that does not exist) panics: it is a bug
//!    of the code under test that no error code should hide. A breach of *discipline* is recorded in
//!    [`Sim::violations`] and the machine goes on.

#![forbid(unsafe_code)]

mod format;
mod log;
mod maintained;
mod memory;
mod mmu;
mod pending;
mod protocol;
mod ram;
mod tables;
mod tlb;
mod walk;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use log::{Event, Violation};
pub use mmu::{StaleEntry, StaleKind};
pub use tables::TableKind;
pub use walk::{Access, El2Stage1, Fault, FaultKind, Leaf, Regime, Stage2};

use log::Log;
use memory::LoadHooks;
use ram::Ram;
use tables::Tables;
use tlb::Tlb;
use walk::Space;

/// A range of RAM; base and size are multiples of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// RAM; the regions are disjoint.
    pub ram: Vec<Region>,
    /// Number of CPUs, at least 1. Each has its own TLB.
    pub cpus: usize,
}

/// A simulated machine. All methods take `&self`; each is one atomic step of the machine.
#[derive(Debug)]
pub struct Sim {
    state: Mutex<State>,
}

/// Everything behind the lock of a [`Sim`].
#[derive(Debug)]
struct State {
    ram: Ram,
    tables: Tables,
    tlbs: Vec<Tlb>,
    /// The translation that each regime uses at present, for [`Sim::stale_entries`].
    current: BTreeMap<Regime, Space>,
    hooks: LoadHooks,
    log: Log,
    icache_invalidations: usize,
}

impl Sim {
    /// Builds a machine whose RAM is untouched and whose TLBs are empty.
    ///
    /// # Panics
    /// When a region is not page-aligned, is empty, wraps or overlaps another, or when there is no CPU.
    #[must_use]
    pub fn new(config: Config) -> Self {
        assert!(config.cpus > 0, "sim: a machine needs at least one CPU");
        Self {
            state: Mutex::new(State {
                ram: Ram::new(&config.ram),
                tables: Tables::default(),
                tlbs: vec![Tlb::default(); config.cpus],
                current: BTreeMap::new(),
                hooks: LoadHooks::default(),
                log: Log::default(),
                icache_invalidations: 0,
            }),
        }
    }

    /// Returns the number of CPUs.
    #[must_use]
    pub fn cpus(&self) -> usize {
        self.lock().tlbs.len()
    }

    /// Takes the lock. A panic of the code under test while it held the lock leaves the machine usable:
    /// tests look at it afterwards.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod testing {
    //! A machine and shorthand for the unit tests of this crate.

    use super::{Config, Region, Sim};

    /// First byte of the RAM of [`machine`].
    pub(crate) const RAM: u64 = 0x4000_0000;
    /// Stage-2 leaf attributes: AF, inner shareable, read and write, Normal write-back, executable.
    pub(crate) const RW: u64 = 1 << 10 | 0b11 << 8 | 0b11 << 6 | 0b1111 << 2;
    /// The same, read only.
    pub(crate) const RO: u64 = 1 << 10 | 0b11 << 8 | 0b01 << 6 | 0b1111 << 2;
    /// Stage-2 XN\[1:0\] = 0b10: not executable at EL1 and EL0.
    pub(crate) const XN: u64 = 0b10 << 53;

    /// Builds a machine of two CPUs with 1 GiB of RAM at [`RAM`].
    pub(crate) fn machine() -> Sim {
        Sim::new(Config { ram: vec![Region { base: RAM, size: 1 << 30 }], cpus: 2 })
    }

    /// Returns a page descriptor.
    pub(crate) fn page(pa: u64, attributes: u64) -> u64 {
        pa | attributes | 0b11
    }

    /// Returns a block descriptor.
    pub(crate) fn block(pa: u64, attributes: u64) -> u64 {
        pa | attributes | 0b01
    }

    /// Returns a table descriptor.
    pub(crate) fn table(pa: u64) -> u64 {
        pa | 0b11
    }

    #[test]
    fn machine_is_shared_between_threads() {
        fn shared<T: Send + Sync>(_: &T) {}
        shared(&machine());
        assert_eq!(machine().cpus(), 2);
    }

    #[test]
    #[should_panic(expected = "at least one CPU")]
    fn machine_without_cpu_is_refused() {
        let _ = Sim::new(Config { ram: vec![], cpus: 0 });
    }
}
