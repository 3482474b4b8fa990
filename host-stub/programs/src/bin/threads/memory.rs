//! A page goes from under the threads that use it.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use host_programs::arch::probe_load;
use host_programs::steps::Steps;
use host_programs::sys::Mapping;
use host_programs::thread::Thread;
use host_programs::uapi::signal;
use host_programs::{Failure, failure};

use crate::run::{for_each_other_cpu, wait_until};

/// How often.
const ROUNDS: u64 = 20;
const MARK: u64 = 0x7e11_7a1e_b0a7_9a6e;

/// What the threads see of a page.
#[derive(Default)]
pub(crate) struct Watch {
    /// It was unmapped before this was set: no load may succeed after.
    gone: AtomicU64,
    /// Threads that have loaded from it for some time.
    began: AtomicU64,
    /// Threads that have lost it as they should: with this signal.
    pub(crate) lost: AtomicU64,
    /// Loads that succeeded although it was gone, or brought what nobody had stored there.
    pub(crate) wrong: AtomicU64,
}

impl Watch {
    /// Lets a thread on each other CPU use a page until it is gone, which is this signal with this code. Returns when all
    /// do.
    pub(crate) fn begin(
        address: u64,
        expected: u64,
        wanted: (u64, u32),
    ) -> Result<(Arc<Self>, Vec<Thread>), Failure> {
        let watch = Arc::new(Self::default());
        let threads = for_each_other_cpu(|| {
            let watch = watch.clone();
            Thread::spawn(move || watch.use_page(address, expected, wanted))
        })?;
        let count = threads.len() as u64;
        if !wait_until(|| watch.began.load(Ordering::Relaxed) == count) {
            return Err(failure!("the threads do not come to their page"));
        }
        Ok((watch, threads))
    }

    fn use_page(&self, address: u64, expected: u64, wanted: (u64, u32)) {
        let mut loads = 0u64;
        loop {
            let gone = self.gone.load(Ordering::Acquire) != 0;
            match probe_load(address) {
                Ok(value) if gone || value != expected => {
                    self.wrong.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Ok(_) => {
                    loads += 1;
                    if loads == 100 {
                        self.began.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Err(signal) => {
                    let right = (signal.number, signal.code) == wanted && signal.address == address;
                    (if right { &self.lost } else { &self.wrong }).fetch_add(1, Ordering::Relaxed);
                    return;
                }
            }
        }
    }

    /// The page has been taken away.
    pub(crate) fn is_gone(&self) {
        self.gone.store(1, Ordering::Release);
    }
}

/// Threads load from a page on all CPUs, and one unmaps it.
pub(crate) fn unmap(steps: &mut Steps) -> Result<(), Failure> {
    steps.tell(format_args!(
        "Threads on all CPUs use a page, and one unmaps it and uses its frame for others, {ROUNDS} times."
    ));
    let (mut lost, mut wrong, mut wanted) = (0, 0, 0);
    for _ in 0..ROUNDS {
        let page = Mapping::anonymous(4096)?;
        page.store(0, MARK).map_err(|signal| failure!("a page of its own: {signal}"))?;
        let gone = (signal::SIGSEGV, signal::SEGV_MAPERR);
        let (watch, threads) = Watch::begin(page.address(0), MARK, gone)?;
        drop(page);
        watch.is_gone();
        // Elsewhere, so that the address stays empty: what has the frame now holds something else.
        let others = Mapping::anonymous(16 * 4096)?;
        for offset in (4096..16 * 4096).step_by(4096) {
            others.store(offset, !MARK).map_err(|signal| failure!("another page: {signal}"))?;
        }
        wanted += threads.len() as u64;
        threads.into_iter().for_each(Thread::join);
        lost += watch.lost.load(Ordering::Relaxed);
        wrong += watch.wrong.load(Ordering::Relaxed);
    }
    steps.equal("every-thread-loses-a-page-that-is-unmapped", wanted, lost);
    steps.equal("and-none-reads-it-once-it-is-gone", 0, wrong);
    Ok(())
}
