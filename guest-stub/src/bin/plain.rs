//! A guest that is not protected: it enrols no device and lives in memory that the host lends it.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::main);

#[cfg(target_os = "none")]
mod image {
    use guest_stub::arch::{entry_record, load64, store64};
    use guest_stub::call::call;
    use guest_stub::device::Device;
    use guest_stub::protocol::{ANSWER, BUFFER, GREETING};

    pub(super) fn main(argument: u64) {
        let mut device = Device::unguarded();
        let [_, x1, ..] = entry_record().general;
        device.check("guest-gets-the-registers-that-the-vmm-set", argument.wrapping_add(1), x1);
        let [features, ..] = call(abi::guest::FEATURES, 0, 0, 0);
        device.check("a-guest-without-protection-has-no-memory-calls", 1, features);
        let [shared, ..] = call(abi::guest::MEM_SHARE, BUFFER, 1, 0);
        device.check("sharing-is-not-supported", abi::smccc::NOT_SUPPORTED, shared);
        store64(BUFFER, GREETING);
        device.phase(1, &[BUFFER]);
        device.check("guest-reads-what-the-vmm-wrote", ANSWER, load64(BUFFER + 8));
    }
}
