//! Which pages a transition is about: those of its first chunk, and their neighbours, so that a split that loses
//! one is seen. Page `n` of the specification's world is page `pfns[n]` of memory; guest page `n` is `gfn + n`.

use super::abstraction;
use crate::addr::{Frame, Gfn, Pages, Pfn};
use crate::machine::Machine;
use crate::pgtable::{REGION_PAGES, rest_of_region};
use crate::watch::Held;
use abi::VmHandle;
use spec::Run;

/// Guest pages of a window: a chunk, and a neighbour on each side.
pub(super) const GUEST_PAGES: usize = REGION_PAGES as usize + 2;
/// Pages of a window: a chunk, neighbours of a run of RAM or of the guest's pages, and [`ELSEWHERE`].
pub(super) const PAGES: usize = REGION_PAGES as usize + 128;
/// The number of every page that the window has no place for.
pub(super) const ELSEWHERE: usize = PAGES - 1;

/// A window.
#[derive(Debug)]
pub(super) struct Window {
    pfns: [u64; PAGES],
    /// Pages that it shows.
    pub(super) len: usize,
    /// The first pages of [`pfns`](Self::pfns) that are consecutive.
    run: usize,
    /// Number of its first guest page.
    pub(super) gfn: u64,
    /// Guest pages that it shows.
    pub(super) gfns: usize,
    /// The VM that the transition is about.
    pub(super) vm: Option<VmHandle>,
}

impl Window {
    /// A window that shows nothing.
    pub(super) const fn new() -> Self {
        Self { pfns: [0; PAGES], len: 0, run: 0, gfn: 0, gfns: 0, vm: None }
    }

    /// Lays the window over the first chunk of a run of RAM or of a guest's pages, or both.
    pub(super) fn lay<M: Machine>(
        &mut self,
        machine: &M,
        held: Held<'_>,
        vm: Option<VmHandle>,
        pfns: Option<Pages<Pfn>>,
        gfns: Option<Pages<Gfn>>,
    ) {
        (self.len, self.run, self.gfn, self.gfns, self.vm) = (0, 0, 0, 0, vm);
        if let Some(pages) = pfns {
            let around = around(pages);
            around.for_each(|pfn| self.add(pfn));
            self.run = self.len;
        }
        if let Some(pages) = gfns {
            let around = around(pages);
            (self.gfn, self.gfns) = (around.start, (around.end - around.start) as usize);
            if let Some(vm) = held.vm {
                self.add_guest_pages(machine, held, vm);
            }
        }
    }

    /// Adds the pages that a guest has, then their neighbours.
    fn add_guest_pages<M: Machine>(&mut self, machine: &M, held: Held<'_>, vm: &crate::vm::Vm) {
        let first = self.len;
        for gfn in 0..self.gfns {
            let Some(pfn) = abstraction::guest_pfn(machine, vm, self.guest_page(gfn)) else { continue };
            // Consecutive guest pages mostly have consecutive pages; others have a place in the run, or none yet. Only
            // a page that is lent can be there twice.
            let is_there =
                if vm.flags.protected { self.in_run(pfn).is_some() } else { self.index_of(pfn) != ELSEWHERE };
            if !is_there {
                self.add(pfn);
            }
        }
        if held.host.is_none() {
            return;
        }
        for at in first..self.len {
            let pfn = self.pfns[at];
            let [before, after] = [at.checked_sub(1), Some(at + 1)];
            let is_next = |at: Option<usize>, pfn| at.is_some_and(|at| at < self.len && self.pfns[at] == pfn);
            let lonely_below = pfn > 0 && !is_next(before, pfn - 1);
            let lonely_above = !is_next(after, pfn + 1);
            if lonely_below && self.index_of(pfn - 1) == ELSEWHERE {
                self.add(pfn - 1);
            }
            if lonely_above && self.index_of(pfn + 1) == ELSEWHERE {
                self.add(pfn + 1);
            }
            if self.is_full() {
                break;
            }
        }
    }

    fn add(&mut self, pfn: u64) {
        if !self.is_full() {
            self.pfns[self.len] = pfn;
            self.len += 1;
        }
    }

    fn is_full(&self) -> bool {
        self.len == ELSEWHERE
    }

    fn in_run(&self, pfn: u64) -> Option<usize> {
        let offset = pfn.checked_sub(self.pfns[0])?;
        (offset < self.run as u64).then_some(offset as usize)
    }

    /// The number of a page in the world.
    pub(super) fn index_of(&self, pfn: u64) -> usize {
        let anywhere = || self.pfns[self.run..self.len].iter().position(|known| *known == pfn);
        let found = self.in_run(pfn).or_else(|| anywhere().map(|at| self.run + at));
        found.unwrap_or(ELSEWHERE)
    }

    /// The page of memory with this number in the world.
    pub(super) fn pfn(&self, number: usize) -> Option<Pfn> {
        Pfn::new(self.pfns[number])
    }

    /// Number of the world's first page.
    pub(super) fn first_pfn(&self) -> u64 {
        self.pfns[0]
    }

    /// The guest page with this number in the world.
    pub(super) fn guest_page(&self, number: usize) -> Option<Gfn> {
        Gfn::new(self.gfn + number as u64)
    }

    /// A guest page's number in the world.
    pub(super) fn guest_index(&self, gfn: Gfn) -> Option<usize> {
        let offset = gfn.as_u64().checked_sub(self.gfn)?;
        (offset < self.gfns as u64).then_some(offset as usize)
    }

    /// A run of RAM, in the world's numbers.
    pub(super) fn pages(&self, pages: Pages<Pfn>) -> Run {
        Run { first: pages.start().as_u64() - self.first_pfn(), count: pages.count() }
    }

    /// A run of guest pages, in the world's numbers.
    pub(super) fn guest_pages(&self, pages: Pages<Gfn>) -> Run {
        Run { first: pages.start().as_u64() - self.gfn, count: pages.count() }
    }
}

/// The pages of a run's first chunk, with a neighbour on each side.
fn around<F: Frame>(pages: Pages<F>) -> core::ops::Range<u64> {
    let first = pages.start().as_u64();
    let count = pages.count().min(rest_of_region(first));
    first.saturating_sub(1)..first + count + 1
}
