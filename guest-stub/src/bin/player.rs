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
    use guest_stub::arch::{attempt, call_page, hvc, load64, secondary_entry, store64};
    use guest_stub::protocol::player;

    /// Asks for commands for ever.
    pub(crate) fn serve(_: u64) {
        let mut report = [0; 4];
        loop {
            let [a, b, c, d] = report;
            report = perform(hvc([u64::from(guest::PTP), a, b, c, d, 0, 0]));
        }
    }

    fn perform([operation, a, b, c]: [u64; 4]) -> [u64; 4] {
        match operation {
            player::LOAD => [0, load64(a), 0, 0],
            player::STORE => {
                store64(a, b);
                [0; 4]
            }
            player::FETCH => match attempt(|| call_page(a)) {
                Ok(()) => [0; 4],
                Err(fault) => [1, fault.syndrome, fault.address, 0],
            },
            player::START => hvc([u64::from(psci::CPU_ON), 1, secondary_entry(serve), 0, 0, 0, 0]),
            function => hvc([function, a, b, c, 0, 0, 0]),
        }
    }
}
