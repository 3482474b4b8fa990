//! Pages that are given behind the specification's back: what calls lack, and what guests are made of.

extern crate alloc;

use alloc::vec::Vec;

use abi::page::Pool;
use abi::{Error, HostCall, VmHandle};
use guest_stub::protocol::player::IMAGE_PAGES;
use host_programs::deed::{Answer, Deed};
use host_programs::player::write_image;
use host_programs::series::Series;
use host_programs::{Failure, failure};

use crate::play::{P, V};

/// Pages for tables and records: they are used again and again.
const SPARE: u64 = 2048;
/// Pages of a 2 MiB region.
const REGION: u64 = 512;

/// What is left.
pub(crate) struct Supply {
    /// Pages of the guests' image as the guests get it, and a place for each guest.
    image: u64,
    places: u64,
    /// The page of [`flag`](Self::flag).
    flag: u64,
    /// Single pages.
    single: Vec<u64>,
    /// Pages that nobody had yet.
    next: u64,
    end: u64,
    /// First page of the block that windows are cut from, and where the next is.
    window: u64,
    windows_end: u64,
}

impl Supply {
    /// Takes what the kernel has.
    pub(crate) fn new(deed: &Deed, series: &mut Series) -> Result<Self, Failure> {
        let image = deed.alloc(IMAGE_PAGES)?;
        let places = deed.alloc(IMAGE_PAGES * V as u64)?;
        let flag = deed.alloc(1)?;
        let next = deed.alloc(SPARE)?;
        let mut pages = deed.stats()?.free.next_power_of_two() / 2;
        let windows = loop {
            match deed.alloc(pages) {
                Ok(pfn) => break pfn,
                Err(_) if pages > 4 * REGION => pages /= 2,
                Err(failure) => return Err(failure),
            }
        };
        // No vector grows later: the program's heap takes nothing back.
        let single = Vec::with_capacity(SPARE as usize);
        let window = (windows + P as u64).next_multiple_of(REGION) - P as u64 / 2;
        let (end, windows_end) = (next + SPARE, windows + pages);
        let supply = Self { image, places, flag, single, next, end, window, windows_end };
        write_image(deed, series, supply.image)?;
        Ok(supply)
    }

    /// Writes the image to the pages of guest `vm`; returns the first.
    pub(crate) fn image_for(&self, deed: &Deed, series: &mut Series, vm: u8) -> Result<u64, Failure> {
        let place = self.places + u64::from(vm) * IMAGE_PAGES;
        series.clear();
        for page in 0..IMAGE_PAGES {
            series.copy(self.image + page, place + page);
        }
        deed.series(series)?;
        let copied = (0..IMAGE_PAGES as usize).all(|at| series.copied(at));
        if copied { Ok(place) } else { Err(failure!("the host cannot write pages that are its own")) }
    }

    /// A word that is the host's for ever and of no other use.
    pub(crate) fn flag(&self) -> u64 {
        self.flag << 12
    }

    /// First page of the window that is in use.
    pub(crate) fn window(&self) -> u64 {
        self.window
    }

    /// Windows that are left behind this one.
    pub(crate) fn windows_left(&self) -> u64 {
        self.windows_end.saturating_sub(self.window + REGION + P as u64) / REGION
    }

    /// Gives up the window, in which pages are lost for good.
    pub(crate) fn next_window(&mut self) -> Result<(), Failure> {
        if self.windows_left() == 0 {
            return Err(failure!("there is no further window of memory"));
        }
        self.window += REGION;
        Ok(())
    }

    /// Adjacent pages, aligned to their number.
    fn take(&mut self, pages: u64) -> Result<u64, Failure> {
        if pages == 1
            && let Some(pfn) = self.single.pop()
        {
            return Ok(pfn);
        }
        let first = self.next.next_multiple_of(pages);
        if first + pages > self.end {
            return Err(failure!("the hypervisor asks for pages without end"));
        }
        (self.next..first).for_each(|pfn| self.single.push(pfn));
        self.next = first + pages;
        Ok(first)
    }

    /// Takes pages back that a VM had.
    pub(crate) fn put_back(&mut self, pages: &mut Vec<u64>) {
        self.single.append(pages);
    }

    /// Gives what a call lacked, just as much as it asked for. Pages for a VM's tables are added to `lent`.
    pub(crate) fn serve(
        &mut self,
        deed: &Deed,
        pool: Pool,
        pages: u64,
        vm: Option<(VmHandle, &mut Vec<u64>)>,
    ) -> Result<(), Failure> {
        match (pool, vm) {
            (Pool::Metadata, _) => {
                let pfn = self.take(pages)?;
                self.give(deed, HostCall::PoolTopUp { pool, pfn, pages })
            }
            // Pages of tables are single ones.
            (Pool::Tables, _) => (0..pages).try_for_each(|_| {
                let pfn = self.take(1)?;
                self.give(deed, HostCall::PoolTopUp { pool, pfn, pages: 1 })
            }),
            (Pool::Vm, Some((vm, lent))) => (0..pages).try_for_each(|_| {
                let pfn = self.take(1)?;
                lent.push(pfn);
                self.give(deed, HostCall::VmTopUp { vm, pfn, pages: 1 })
            }),
            (Pool::Vm, None) => Err(failure!("a VM's pool lacks pages in a call about no VM")),
        }
    }

    fn give(&mut self, deed: &Deed, call: HostCall) -> Result<(), Failure> {
        for _ in 0..8 {
            let Answer::Served(result) = deed.call(call)? else { break };
            let [lacking, pool, ..] = result.values;
            match result.outcome {
                Ok(()) => return Ok(()),
                Err(Error::NoMemory) if Pool::from_word(pool) == Some(Pool::Tables) => {
                    self.serve(deed, Pool::Tables, lacking, None)?;
                }
                Err(error) => return Err(failure!("what was asked for is refused: {call:?}: {error}")),
            }
        }
        Err(failure!("what was asked for is refused: {call:?}"))
    }
}
