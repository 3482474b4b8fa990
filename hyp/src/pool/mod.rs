//! Pages and records that the hypervisor owns: [`PagePool`] for translation tables, [`records`] for VMs and
//! vCPUs. Both fail instead of growing; the host is told how many pages are lacking (docs/memory-ownership.md, Pools, and who pays).

pub mod records;

use crate::addr::{Pages, Pfn};
use crate::machine::Machine;
use abi::page::Pool;

/// Pages are lacking: which pool, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lacking {
    /// The pool.
    pub pool: Pool,
    /// How many pages will do.
    pub pages: u64,
}

/// Table pages to ask for at once: more than any donation takes for itself ([`crate::ownership::TOPUP_RESERVE`]),
/// so that a top-up of so many always leaves the pool fuller than before.
const TABLE_BATCH: u64 = 8;

impl Lacking {
    /// What to ask for, so that a run of so many pages, aligned to their number, is enough by itself.
    #[cold]
    #[inline(never)]
    pub fn rounded(self) -> Self {
        let least = if self.pool == Pool::Tables { TABLE_BATCH } else { 1 };
        let pages = self.pages.max(least).checked_next_power_of_two().unwrap_or(self.pages);
        Self { pages, ..self }
    }
}

/// Free table pages, as a list threaded through the pages themselves: constant time, no memory of its own.
///
/// The pages are the hypervisor's, mapped at EL2 and reachable by nobody else; whoever holds the lock of the
/// tables that the pool serves holds the pool too. So [`free`](Self::free) under that lock is a reservation.
#[derive(Debug, Default)]
pub struct PagePool {
    top: Option<Pfn>,
    free: u64,
    /// Pages given to the pool so far, in use or free.
    total: u64,
}

impl PagePool {
    /// A pool of nothing.
    pub const fn new() -> Self {
        Self { top: None, free: 0, total: 0 }
    }

    /// Number of free pages.
    pub fn free(&self) -> u64 {
        self.free
    }

    /// Pages that were given to the pool with [`extend`](Self::extend), in use or free.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Checks that `pages` can be taken while `reserve` stay.
    pub fn check(&self, pool: Pool, pages: u64, reserve: u64) -> Result<(), Lacking> {
        #[cfg(any(test, feature = "sim"))]
        if crate::testing::failure::refuses(pool, pages) {
            return Err(Lacking { pool, pages }.rounded());
        }
        if pages == 0 {
            return Ok(());
        }
        let available = self.free.saturating_sub(reserve);
        match pages.checked_sub(available) {
            None | Some(0) => Ok(()),
            Some(lacking) => Err(Lacking { pool, pages: lacking }.rounded()),
        }
    }

    /// Puts a page back that was taken.
    pub fn push<M: Machine>(&mut self, machine: &M, page: Pfn) {
        // Page 0 is no RAM on any machine that Deed runs on, so 0 can end the list; bit 0 stays clear, so a
        // link is never taken for a valid descriptor.
        let link = self.top.map_or(0, |top| top.base().as_u64());
        machine.write_descriptor(page.base(), link);
        self.top = Some(page);
        self.free = self.free.saturating_add(1);
    }

    /// Gives a run of new pages to the pool.
    pub fn extend<M: Machine>(&mut self, machine: &M, pages: Pages<Pfn>) {
        for page in pages.iter() {
            self.push(machine, page);
        }
        self.total = self.total.saturating_add(pages.count());
    }

    /// The page that [`pop`](Self::pop) would take.
    pub fn top(&self) -> Option<Pfn> {
        self.top
    }

    /// Takes a page; its content is undefined.
    pub fn pop<M: Machine>(&mut self, machine: &M) -> Option<Pfn> {
        let page = self.top?;
        let link = machine.read_descriptor(page.base());
        self.top = crate::addr::PhysAddr::new(link).filter(|link| link.as_u64() != 0).map(Pfn::containing);
        self.free = self.free.saturating_sub(1);
        Some(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMachine;

    #[test]
    fn a_pool_gives_back_what_it_was_given_and_then_nothing() {
        let machine = TestMachine::new();
        let pages = machine.ram(0, 3);
        let mut pool = PagePool::new();
        pool.extend(&machine, pages);
        assert_eq!(pool.free(), 3);
        let mut taken: Vec<_> = core::iter::from_fn(|| pool.pop(&machine)).collect();
        taken.sort();
        assert_eq!(taken, pages.iter().collect::<Vec<_>>());
        assert_eq!((pool.free(), pool.total()), (0, 3));
        assert_eq!(pool.pop(&machine), None);
    }

    #[test]
    fn a_reserve_is_not_available() {
        let machine = TestMachine::new();
        let mut pool = PagePool::new();
        pool.extend(&machine, machine.ram(0, 4));
        assert_eq!(pool.check(Pool::Tables, 2, 2), Ok(()));
        assert_eq!(pool.check(Pool::Tables, 3, 2), Err(Lacking { pool: Pool::Tables, pages: TABLE_BATCH }));
        assert_eq!(pool.check(Pool::Vm, 5, 0), Err(Lacking { pool: Pool::Vm, pages: 1 }));
        assert_eq!(pool.check(Pool::Vm, 7, 0), Err(Lacking { pool: Pool::Vm, pages: 4 }));
    }
}
