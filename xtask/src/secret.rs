//! The secret that a guest keeps in a scenario with `[search]`.
//!
//! Only a nonce travels (through the host's arguments); the guest and this module derive the same 64 bytes
//! from it, so that the bytes stand nowhere but where the guest put them.

use anyhow::Result;
use std::io::Read;

/// Bytes of the secret.
pub(crate) const LENGTH: usize = 64;
/// Bytes that count as a find: any of the words that the secret is made of.
pub(crate) const PIECE: usize = 8;

/// Returns the 64 secret bytes that belong to a nonce (xorshift64*, eight words, little-endian).
pub(crate) fn derive(nonce: u64) -> [u8; LENGTH] {
    let mut secret = [0; LENGTH];
    let mut state = nonce;
    for word in secret.chunks_exact_mut(8) {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        word.copy_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    secret
}

/// Finds pieces of a secret in bytes.
#[derive(Debug)]
pub(crate) struct Pattern {
    pieces: Vec<[u8; PIECE]>,
    /// First bytes of the pieces, to pass over most places with one comparison each.
    first: [bool; 256],
}

impl Pattern {
    /// Looks for the secret that belongs to `nonce`.
    pub(crate) fn of_nonce(nonce: u64) -> Self {
        let pieces: Vec<[u8; PIECE]> =
            derive(nonce).chunks_exact(PIECE).map(|piece| piece.try_into().expect("16 bytes")).collect();
        let mut first = [false; 256];
        for piece in &pieces {
            first[usize::from(piece[0])] = true;
        }
        Self { pieces, first }
    }

    /// Returns the offsets in `bytes` at which a piece stands, at any alignment.
    pub(crate) fn find(&self, bytes: &[u8]) -> Vec<usize> {
        let is_piece = |window: &&[u8]| self.pieces.iter().any(|piece| piece.as_slice() == *window);
        bytes
            .windows(PIECE)
            .enumerate()
            .filter(|(_, window)| self.first[usize::from(window[0])] && is_piece(window))
            .map(|(offset, _)| offset)
            .collect()
    }
}

/// Returns a number that nobody can guess, and that is not zero (xorshift would stay there).
pub(crate) fn nonce() -> Result<u64> {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes) | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_derivation_is_the_documented_one() {
        let secret = derive(1);
        // The first number of xorshift64* from state 1, as published with the generator.
        assert_eq!(&secret[..8], &0x47e4_ce4b_896c_dd1d_u64.to_le_bytes());
        assert_ne!(&secret[..8], &secret[8..16]);
        assert_ne!(derive(2), secret);
    }

    #[test]
    fn a_piece_is_found_at_any_alignment_and_a_torn_piece_is_not() {
        let secret = derive(7);
        let pattern = Pattern::of_nonce(7);
        for at in [0, 1, 4095] {
            let mut bytes = vec![0; 8192];
            bytes[at..at + PIECE].copy_from_slice(&secret[16..16 + PIECE]);
            assert_eq!(pattern.find(&bytes), [at]);
            bytes[at + 3] ^= 1;
            assert_eq!(pattern.find(&bytes), [] as [usize; 0]);
        }
        assert_eq!(Pattern::of_nonce(8).find(&secret), [] as [usize; 0]);
    }

    #[test]
    fn the_nonce_itself_is_no_find() {
        let nonce = nonce().unwrap();
        let text = format!("secret-nonce={nonce:016x}");
        assert_eq!(Pattern::of_nonce(nonce).find(text.as_bytes()), [] as [usize; 0]);
        assert_eq!(Pattern::of_nonce(nonce).find(&nonce.to_le_bytes().repeat(4)), [] as [usize; 0]);
    }
}
