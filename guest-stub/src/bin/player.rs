//! Does what the host tells it, one thing at a time, on both vCPUs: calls, loads, stores and instruction fetches at
//! any address ([`guest_stub::protocol::player`]).

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::serve);

#[cfg(target_os = "none")]
mod image {
    use abi::{guest, psci};
    use guest_stub::arch::{Fault, attempt, call_page, hvc, load64, secondary_entry, store64};
    use guest_stub::protocol::player;

    /// Asks for commands for ever.
    pub(crate) fn serve(_: u64) {
        let mut report = [0; 4];
        loop {
            let [a, b, c, d] = report;
            report = perform(hvc([u64::from(guest::PTP), a, b, c, d, 0, 0]));
        }
    }

    /// What came of an access: 0 and the value, or 1 and the exception.
    fn told(outcome: Result<u64, Fault>) -> [u64; 4] {
        match outcome {
            Ok(value) => [0, value, 0, 0],
            Err(fault) => [1, fault.syndrome, fault.address, 0],
        }
    }

    /// Makes an access for ever, and stores at `progress` how often it was made.
    fn spin(progress: u64, access: impl Fn(u64)) -> [u64; 4] {
        for count in 0.. {
            if let Err(fault) = attempt(|| access(count)) {
                return told(Err(fault));
            }
            store64(progress, count + 1);
        }
        [0; 4]
    }

    fn perform([operation, a, b, c]: [u64; 4]) -> [u64; 4] {
        match operation {
            player::LOAD => told(attempt(|| load64(a))),
            player::STORE => told(attempt(|| store64(a, b)).map(|()| 0)),
            player::FETCH => told(attempt(|| call_page(a)).map(|()| 0)),
            player::START => hvc([u64::from(psci::CPU_ON), 1, secondary_entry(serve), 0, 0, 0, 0]),
            player::SPIN_LOAD => spin(b, |_| _ = load64(a)),
            player::SPIN_STORE => spin(b, |count| store64(a, count)),
            function => hvc([function, a, b, c, 0, 0, 0]),
        }
    }
}
