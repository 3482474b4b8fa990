//! The end of the machine's run, whoever asks for it: guests are wiped, then the one line that says how the
//! run went, with the nonce that the host never saw.

use super::el2::El2;
use super::power;
use crate::Hypervisor;
use crate::boot::plan::MAX_NONCE;
use crate::psci::End;
use arrayvec::ArrayString;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Once;

static NONCE: Once<ArrayString<MAX_NONCE>> = Once::new();

/// Keeps the nonce of this run.
pub fn set_nonce(nonce: ArrayString<MAX_NONCE>) {
    NONCE.call_once(|| nonce);
}

/// Whether a CPU ends the run.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Wipes what guests own, prints the verdict, and relays the call to the firmware. A CPU that comes second stops here.
pub fn end_run(hypervisor: &Hypervisor<El2>, end: End) -> ! {
    if ENDING.swap(true, Ordering::Relaxed) {
        power::park();
    }
    let wiped = hypervisor.wipe_all_guests();
    if wiped != 0 {
        log::info!("wiped {wiped} pages that guests still owned");
    }
    if let Some(nonce) = NONCE.get() {
        let census = hypervisor.census();
        log::info!(
            "verdict nonce={nonce} reason={} aborts={} host={} hyp={} guest={}{}",
            end.name(),
            hypervisor.counters.aborts_injected.load(Ordering::Relaxed),
            census.host,
            census.hyp,
            census.guest,
            oracle_words(),
        );
    }
    power::end(end)
}

/// What the oracle did and cost, as words of the verdict.
#[cfg(feature = "oracle")]
fn oracle_words() -> impl core::fmt::Display {
    crate::oracle::cost()
}

/// A build without an oracle has nothing to say of it.
#[cfg(not(feature = "oracle"))]
fn oracle_words() -> impl core::fmt::Display {
    ""
}
