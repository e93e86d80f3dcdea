//! What a loss of power, or a kill of the process, leaves of the contents.

use std::collections::BTreeMap;

use super::{SECTOR, Sim, SimStorage, random};

impl SimStorage {
    /// Cuts the power when `operations` more operations that change something (or flush) have begun:
    /// from then on everything fails and nothing has an effect.
    pub fn cut_power_after(&self, operations: u64) {
        self.state().power = Some(operations);
    }

    /// Cuts the power now.
    pub fn cut_power(&self) {
        self.state().dead = true;
    }

    /// True once the power is gone.
    pub fn is_dead(&self) -> bool {
        self.state().dead
    }

    /// An image as a loss of power now could leave it, by the chance of `seed`.
    pub fn crash(&self, seed: u64) -> Vec<u8> {
        let mut rng = seed.wrapping_mul(0xd134_2543_de82_ef95) | 1;
        self.crash_with(|_, versions| (random(&mut rng) % versions as u64) as usize)
    }

    /// The same by choice: `choose(sector, versions)` says which version of each sector that changed
    /// since the last flush survives: 0 is the durable one, `versions - 1` the newest. It is asked about
    /// the length of the file last, as sector `u64::MAX`.
    pub fn crash_with(&self, mut choose: impl FnMut(u64, usize) -> usize) -> Vec<u8> {
        let state = self.state();
        let mut view = state.durable.clone();
        let mut versions: BTreeMap<u64, Vec<[u8; SECTOR]>> = BTreeMap::new();
        let mut lengths = vec![view.len()];
        for change in state.completed.iter().chain(state.under_way.values()) {
            let range = change.range(view.len() as u64);
            let sectors = range.start / SECTOR as u64..range.end.div_ceil(SECTOR as u64);
            for sector in sectors.clone() {
                let old = sector_of(&view, sector);
                versions.entry(sector).or_insert_with(|| vec![old]);
            }
            change.apply(&mut view);
            for sector in sectors {
                let new = sector_of(&view, sector);
                versions.entry(sector).or_default().push(new);
            }
            if lengths.last() != Some(&view.len()) {
                lengths.push(view.len());
            }
        }
        let mut image = state.durable.clone();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        image.resize(longest.next_multiple_of(SECTOR), 0);
        for (sector, versions) in versions {
            let pick = choose(sector, versions.len()).min(versions.len() - 1);
            let at = sector as usize * SECTOR;
            if let Some(to) = image.get_mut(at..at + SECTOR) {
                to.copy_from_slice(&versions[pick]);
            }
        }
        let pick = choose(u64::MAX, lengths.len()).min(lengths.len() - 1);
        image.truncate(lengths[pick]);
        image
    }

    /// What goes on after a kill of the process: of what was under way some has happened; nothing that was not
    /// durable is so now. It behaves as `config` says.
    pub fn after_kill(&self, seed: u64, config: Sim) -> Self {
        let mut rng = seed.wrapping_mul(0xd134_2543_de82_ef95) | 1;
        let state = self.state();
        let after = Self::new(state.durable.clone(), config).with_inode(self.inode);
        {
            let mut new = after.state();
            new.current.clone_from(&state.current);
            new.completed.clone_from(&state.completed);
            for change in state.under_way.values() {
                if random(&mut rng) % 2 == 0 {
                    change.apply(&mut new.current);
                    new.completed.push(change.clone());
                }
            }
        }
        after
    }
}

fn sector_of(image: &[u8], sector: u64) -> [u8; SECTOR] {
    let mut out = [0; SECTOR];
    let start = (sector as usize * SECTOR).min(image.len());
    let end = (start + SECTOR).min(image.len());
    out[..end - start].copy_from_slice(&image[start..end]);
    out
}
