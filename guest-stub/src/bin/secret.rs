//! The guest of the default scenario: makes a secret at run time, keeps it in three pages and in vector
//! registers, shares buffers with the host and takes them back. With other arguments it is the second guest, which
//! looks for leftovers at the same addresses, or holds its secret in registers and never exits.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::main);

#[cfg(target_os = "none")]
mod image {
    use guest_stub::arch::{load64, set_vectors, spin_with, store64, vectors};
    use guest_stub::call::{call, share, unshare};
    use guest_stub::device::Device;
    use guest_stub::protocol::{
        ANSWER, ARGUMENT_HOLD, ARGUMENT_LOOK, BUFFER, BUFFER_PAGES, GREETING, PAGE_SIZE, Phase,
        SECOND_BUFFER, SECRET_PAGES, Secret, secret,
    };

    pub(super) fn main(argument: u64) {
        match argument {
            ARGUMENT_LOOK => look(),
            ARGUMENT_HOLD => hold(),
            _ => keep(),
        }
    }

    /// The second guest: everything that the first one wrote must be gone.
    fn look() {
        let mut words = 0;
        for page in SECRET_PAGES.into_iter().chain([BUFFER, BUFFER + PAGE_SIZE, SECOND_BUFFER]) {
            for offset in (0..PAGE_SIZE).step_by(8) {
                words += u64::from(load64(page + offset) != 0);
            }
        }
        let mut device = Device::enrol();
        device.phase(Phase::Ready as u64, &[]);
        device.check("second-guest-reads-zeros-at-the-first-guests-addresses", 0, words);
        device.check("second-guest-finds-zeros-in-its-vector-registers", 0, vector_leftovers());
        device.phase(Phase::Looked as u64, &[words]);
    }

    /// EL2 is called with the secret, and the host's interrupts find it in general and vector registers.
    fn hold() {
        let mut device = Device::enrol();
        device.phase(Phase::Ready as u64, &[]);
        let words = secret(device.value(0));
        set_vectors(&words);
        device.phase(Phase::Kept as u64, &[]);
        // Each is refused, but EL2 has to look at what it is given.
        let [a, b, c, ..] = words;
        for function in
            [abi::guest::MEM_SHARE, abi::guest::MEM_UNSHARE, abi::psci::CPU_ON, abi::psci::AFFINITY_INFO]
        {
            call(function, a, b, c);
        }
        spin_with(&words);
    }

    fn vector_leftovers() -> u64 {
        let record = guest_stub::arch::entry_record();
        record.vector.iter().flatten().filter(|word| **word != 0).count() as u64
    }

    fn keep() {
        let (mut device, [enrolled, mapped]) = Device::enrol_with_status();
        device.check("guest-enrols-its-device", 0, enrolled | mapped);
        device.phase(Phase::Ready as u64, &[]);

        let words = secret(device.value(0));
        for page in SECRET_PAGES {
            store_secret(page, &words);
        }
        set_vectors(&words);
        device.phase(Phase::Kept as u64, &SECRET_PAGES);
        report_kept(&mut device, &words, "guest-keeps-its-secret-while-the-host-pries");

        share_and_talk(&mut device);
        unshare_from_a_host_that_does_not_unmap(&mut device);

        report_kept(&mut device, &words, "guest-still-has-its-secret-at-the-end");
        device.phase(Phase::StillKept as u64, &[]);
    }

    /// Both sides write to the buffer and read each other, then it is private again.
    fn share_and_talk(device: &mut Device) {
        store64(BUFFER, GREETING);
        store64(BUFFER + PAGE_SIZE, GREETING);
        device.check("guest-shares-its-buffer", 0, share(BUFFER, BUFFER_PAGES));
        device.phase(Phase::Shared as u64, &[BUFFER, BUFFER_PAGES]);
        device.check("guest-reads-the-hosts-answer", ANSWER, load64(BUFFER + 8));
        device.check("guest-reads-the-hosts-answer-in-the-next-page", ANSWER, load64(BUFFER + PAGE_SIZE + 8));
        device.check("guest-unshares-its-buffer", 0, unshare(BUFFER, BUFFER_PAGES));
        store64(BUFFER, !GREETING);
        device.phase(Phase::Unshared as u64, &[BUFFER, BUFFER_PAGES]);
        device.check("guest-finds-its-buffer-as-it-left-it", !GREETING, load64(BUFFER));
    }

    fn unshare_from_a_host_that_does_not_unmap(device: &mut Device) {
        store64(SECOND_BUFFER, GREETING);
        device.check("guest-shares-another-page", 0, share(SECOND_BUFFER, 1));
        device.phase(Phase::SharedAgain as u64, &[SECOND_BUFFER, 1]);
        device.check("guest-unshares-from-a-host-that-does-not-unmap", 0, unshare(SECOND_BUFFER, 1));
        store64(SECOND_BUFFER, !GREETING);
        device.phase(Phase::UnsharedAgain as u64, &[SECOND_BUFFER, 1]);
        device.check("guest-finds-that-page-as-it-left-it", !GREETING, load64(SECOND_BUFFER));
    }

    fn store_secret(page: u64, words: &Secret) {
        for (index, word) in words.iter().enumerate() {
            store64(page + 8 * index as u64, *word);
        }
    }

    fn report_kept(device: &mut Device, words: &Secret, name: &str) {
        let in_pages = SECRET_PAGES.into_iter().flat_map(|page| {
            words.iter().enumerate().map(move |(index, word)| load64(page + 8 * index as u64) != *word)
        });
        let in_vectors = vectors().into_iter().zip(words).map(|(value, word)| value != *word);
        let wrong = in_pages.chain(in_vectors).filter(|wrong| *wrong).count();
        device.check(name, 0, wrong as u64);
    }
}
